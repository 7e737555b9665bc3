from dataclasses import replace

import pytest
import torch

from kernels.prefill_config import PrefillConfig, prefill_configs
from kernels.prefill_linear import prefill_linear
from kernels.sliced import field_widths
from tests.kernels.hopper_emulator import emulated_prefill
from tests.kernels.tile_cases import (
    product_of_codes,
    random_codes,
    sliced_weight,
    token_codes,
)

SHARED_BYTES = 227 * 1024


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("slice_bytes", [32, 64, 128])
def test_candidates_fit_shared_memory_and_start_with_many_outputs(bits, slice_bytes):
    configs = prefill_configs(field_widths(bits), slice_bytes)

    assert configs[0].block_n == 256
    assert configs[0].block_m == 128
    assert all(c.shared_bytes(field_widths(bits)) < SHARED_BYTES for c in configs)
    assert all(c.block_k <= slice_bytes and c.stages > 1 for c in configs)


@pytest.mark.parametrize("bits", range(1, 9))
def test_small_batches_have_candidates_that_share_a_multiprocessor(bits):
    configs = prefill_configs(field_widths(bits), 128, 11)

    assert {c.block_m for c in configs} == {16}
    for config in configs:
        resident = config.programs // 132
        assert resident * config.shared_bytes(field_widths(bits)) < SHARED_BYTES
    assert any(c.programs > 132 for c in configs)


@pytest.mark.parametrize(("bits", "groups"), [(8, 2), (4, 8)])
def test_groups_that_it_does_not_know_are_refused(bits, groups):
    weight, _ = sliced_weight(random_codes(64, 256, bits), bits, groups=groups)

    with pytest.raises(ValueError, match=f"{groups} groups of {256 // groups} columns"):
        prefill_linear(token_codes(2, weight, 8), weight)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_orders_bring_every_byte_in_time_and_no_buffer_is_filled_too_early(bits, late):
    block_rows = 64 if bits % 2 else 128
    weight, codes = sliced_weight(random_codes(300, 600, bits), bits, block_rows=block_rows)
    tokens = token_codes(70, weight, 8)
    bias = torch.randn(300)
    config = PrefillConfig(
        block_m=64, block_n=256 if bits < 5 else 128, block_k=32, stages=2 + bits % 3,
        programs=3, group_m=2,
    )  # fmt: skip

    actual = emulated_prefill(late=late)(
        tokens, weight, bias, out_dtype=torch.float32, config=config
    )

    assert torch.equal(actual, product_of_codes(tokens, codes, weight, bias))


@pytest.mark.parametrize(
    ("block_m", "block_n", "warps", "bits"), [(16, 64, 4, 2), (32, 64, 4, 3), (16, 128, 4, 4)]
)
def test_small_tiles_of_few_tokens_are_exact(block_m, block_n, warps, bits):
    weight, codes = sliced_weight(random_codes(200, 600, bits), bits, block_rows=64)
    tokens = token_codes(19, weight, 8)
    config = PrefillConfig(
        block_m=block_m, block_n=block_n, block_k=32, stages=4, num_warps=warps, programs=5
    )

    actual = emulated_prefill(late=True)(
        tokens, weight, None, out_dtype=torch.float32, config=config
    )

    assert torch.equal(actual, product_of_codes(tokens, codes, weight, None))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("bits", "outputs"), [(2, 296), (5, 296), (4, 301)])
def test_results_that_leave_by_one_copy_are_those_that_threads_write(bits, outputs, late):
    weight, _ = sliced_weight(random_codes(outputs, 600, bits), bits, block_rows=64)
    tokens = token_codes(150, weight, 8)
    tokens = replace(tokens, scale=tokens.scale * 2.0**-8)
    bias = torch.randn(outputs)
    written = [
        emulated_prefill(late=late)(
            tokens, weight, bias, out_dtype=torch.float16, config=PrefillConfig(
                block_m=64, block_n=128, block_k=32, stages=2, programs=2, staged=staged
            ),
        )
        for staged in (False, True)
    ]  # fmt: skip

    assert written[0].isfinite().all()
    assert torch.equal(*written)


@pytest.mark.parametrize("late", [False, True])
def test_a_launch_that_three_bits_borrow_of_four_ends_and_is_exact(late):
    weight, codes = sliced_weight(random_codes(100, 1100, 3), 3, slice_bytes=128)
    tokens = token_codes(11, weight, 8)
    four_bits = PrefillConfig(
        block_m=16, block_n=64, block_k=128, stages=5, num_warps=4, programs=3 * 132
    )
    config = four_bits.fitted(weight.field_bits, weight.slice_bytes)

    actual = emulated_prefill(late=late)(
        tokens, weight, None, out_dtype=torch.float32, config=replace(config, programs=1)
    )

    assert (config.block_k, config.stages) == (64, 3)
    assert torch.equal(actual, product_of_codes(tokens, codes, weight, None))


def test_half_step_grids_double_their_codes():
    weight, codes = sliced_weight(random_codes(64, 256, 3), 3, half_step=True)
    tokens = token_codes(5, weight, 4)
    config = PrefillConfig(block_m=64, block_n=128, block_k=32, stages=3)

    actual = emulated_prefill(late=True)(tokens, weight, out_dtype=torch.float32, config=config)

    assert torch.equal(actual, product_of_codes(tokens, codes, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("block_rows", "m"), [(64, 300), (128, 300), (64, 13), (64, 50)])
def test_prefill_equals_an_int64_product(bits, block_rows, m):
    weight, codes = sliced_weight(
        random_codes(704, 1100, bits), bits, device="cuda", block_rows=block_rows
    )
    tokens = token_codes(m, weight, 8, device="cuda")
    tokens = replace(tokens, scale=tokens.scale * 2.0**-11)
    bias = torch.randn(704, device="cuda")
    expected = product_of_codes(tokens, codes, weight, bias)
    assert expected.half().isfinite().all()

    for config in prefill_configs(weight.field_bits, weight.slice_bytes, m):
        # every launch is compiled: the staged ones for the dtypes that they stage
        dtype = (torch.float16, torch.bfloat16)[bits % 2] if config.staged else torch.float32
        actual = prefill_linear(tokens, weight, bias, out_dtype=dtype, config=config)

        assert torch.equal(actual, expected.to(dtype)), (config, dtype)


@pytest.mark.gpu
def test_few_programs_walk_many_tiles():
    weight, codes = sliced_weight(random_codes(1024, 512, 4), 4, device="cuda")
    tokens = token_codes(1000, weight, 8, device="cuda")
    config = PrefillConfig(block_m=128, block_n=128, block_k=64, stages=3, programs=5, group_m=3)

    actual = prefill_linear(tokens, weight, out_dtype=torch.float32, config=config)

    assert torch.equal(actual, product_of_codes(tokens, codes, weight))
