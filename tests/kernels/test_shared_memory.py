from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from kernels import shared_memory
from kernels.half_linear import HalfConfig, half_configs
from kernels.prefill_config import PrefillConfig
from kernels.prefill_linear import prefill_linear
from kernels.shared_memory import SHARED_BYTES, LoopOperands, fit_loop, loop_bytes, room_of
from kernels.sliced import field_widths
from kernels.tile_config import LaunchConfig, TileShape, select_config
from tests.kernels.tile_cases import random_codes, sliced_weight, token_codes

THREE_BITS = LoopOperands(field_bits=(2, 1), slice_bytes=128, grouped=False, token_bytes=1)
TILE = LaunchConfig(block_m=64, block_n=128, block_k=128, num_warps=8, num_stages=4, splits=4)


def test_a_loop_holds_a_stage_less_of_what_goes_through_registers():
    assert loop_bytes(TILE, THREE_BITS) == 128 * (4 * 8 * 64 + 3 * 3 * 128)


def test_warps_that_multiply_alone_read_everything_through_registers():
    alone = replace(TILE, block_n=32, num_warps=2)

    assert loop_bytes(alone, THREE_BITS) == 128 * 3 * (8 * 64 + 3 * 32)


def test_bytes_of_8_bits_are_codes_as_they_lie_but_for_16_bit_activations():
    eight = replace(THREE_BITS, field_bits=(8,))

    assert loop_bytes(TILE, eight) == 128 * 4 * (64 + 128)
    assert loop_bytes(TILE, replace(eight, token_bytes=2)) == 128 * (4 * 2 * 64 + 3 * 128)


def test_a_launch_that_fits_stays_as_it_is():
    one = replace(TILE, num_stages=2)

    assert fit_loop(one, THREE_BITS) == one


def test_stages_go_first_then_columns_then_tokens():
    half = replace(THREE_BITS, token_bytes=2)

    assert fit_loop(TILE, THREE_BITS) == replace(TILE, num_stages=2)
    assert fit_loop(TILE, half) == replace(TILE, block_k=64, num_stages=2)
    # a group takes whole slices
    assert fit_loop(TILE, replace(half, grouped=True)) == replace(TILE, block_m=32, num_stages=2)


@pytest.mark.parametrize("fields", [(1,), (2, 1), (4, 2, 1)])
@pytest.mark.parametrize("m", [16, 32, 64])
def test_half_activations_fit_at_any_width_and_number_of_tokens(fields, m):
    wanted = HalfConfig(block_m=m, block_n=128, block_k=128, num_warps=8, num_stages=4)

    fitted = wanted.fitted(fields, 128, grouped=False)

    operands = replace(THREE_BITS, field_bits=fields, token_bytes=2)
    assert fitted.num_stages >= 2
    assert loop_bytes(fitted, operands) <= SHARED_BYTES


@pytest.mark.parametrize("room", [99 * 1024, 163 * 1024])
@pytest.mark.parametrize("bits", range(1, 9))
def test_smaller_gpus_get_launches_that_fit_them(bits, room):
    eight = LoopOperands(
        field_bits=field_widths(bits), slice_bytes=128, grouped=False, token_bytes=1
    )
    for m in (16, 64, 2048):
        shape = TileShape(bits=bits, m=m, n=4096, columns=4096, slice_bytes=128)
        tile = select_config(shape).fitted(eight.field_bits, 128, grouped=False, room=room)
        half = half_configs(bits=bits, m=min(m, 64), n=4096, columns=4096)[0]
        half = half.fitted(eight.field_bits, 128, grouped=False, room=room)

        assert tile.num_stages >= 2 <= half.num_stages
        assert loop_bytes(tile, eight) <= room
        assert loop_bytes(half, replace(eight, token_bytes=2)) <= room


def test_the_driver_says_how_much_a_gpu_has(monkeypatch):
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 1000 + index})
    driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(shared_memory, "_room_of", shared_memory._room_of.__wrapped__)  # noqa: SLF001  what others keep

    assert room_of(torch.device("cuda", 1)) == 1001
    assert room_of(torch.device("cpu")) == SHARED_BYTES


@pytest.mark.parametrize(
    ("block_m", "block_n", "programs", "warps"), [(16, 64, 3, 4), (64, 256, 1, 8), (256, 64, 2, 4)]
)
@pytest.mark.parametrize("wide", [False, True])
def test_a_pipeline_never_has_fewer_than_two_stages(block_m, block_n, programs, warps, wide):
    four_bits = PrefillConfig(
        block_m=block_m, block_n=block_n, block_k=128, stages=4, num_warps=warps,
        programs=132 * programs, staged=True,
    )  # fmt: skip

    fitted = four_bits.fitted((2, 1), 128, wide=wide)

    asked = fitted.shared_bytes((2, 1)) + fitted.scratch_bytes(grouped=False, wide=wide)
    assert fitted.stages >= 2
    assert asked * (fitted.programs // 132) <= SHARED_BYTES


def test_groups_take_whole_slices_and_cut_outputs_and_programs_instead():
    paired = PrefillConfig(
        block_m=128,
        block_n=256,
        block_k=64,
        stages=2,
        num_warps=4,
        programs=264,
        part_m=128,
        turn=8,
    )

    fitted = paired.fitted((4, 2, 1), 64, 2, wide=True)

    assert (fitted.block_m, fitted.part_m, fitted.block_k) == (64, 64, 64)
    assert (fitted.block_n, fitted.programs, fitted.stages) == (64, 132, 2)


def test_a_tile_that_shared_memory_cannot_hold_at_all_is_refused():
    wide_groups = PrefillConfig(block_m=64, block_n=128, block_k=128, stages=2)

    with pytest.raises(ValueError, match="no room for 2 stages"):
        wide_groups.fitted((4, 2, 1), 128, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_pipeline_of_one_stage_would_wait_forever_and_is_refused(groups):
    weight, _ = sliced_weight(random_codes(64, 256, 4), 4, groups=groups)
    one = PrefillConfig(block_m=64, block_n=64, block_k=64, stages=1, num_warps=4)

    with pytest.raises(ValueError, match="1 stages order no bytes ahead"):
        prefill_linear(token_codes(2, weight, 8), weight, config=one)
