import dataclasses

import pytest
import torch

from kernels.tile_config import LaunchConfig, TileShape, select_config, tile_configs
from tests.kernels.tile_cases import (
    load_kernel_modules,
    product_of_codes,
    random_codes,
    sliced_weight,
    token_codes,
)

SMALL = LaunchConfig(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture
def tile_linear(monkeypatch, device):
    names = ["field_codes", "split_sum", "tile_linear"]
    return load_kernel_modules(names, interpreted=device == "cpu", monkeypatch=monkeypatch)


def equal_to_int64(module, tokens, weight, codes, config, bias=None):
    actual = module.tile_linear(tokens, weight, bias, out_dtype=torch.float32, config=config)
    expected = product_of_codes(tokens, codes, weight, bias)
    return torch.equal(actual, expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("a_bits", [3, 8])
def test_every_width_equals_an_int64_product(tile_linear, device, bits, a_bits):
    weight, codes = sliced_weight(random_codes(70, 300, bits), bits, device=device)
    tokens = token_codes(5, weight, a_bits, device=device)
    bias = torch.randn(70, device=device)

    assert equal_to_int64(tile_linear, tokens, weight, codes, SMALL, bias)


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 129])
def test_any_number_of_tokens_is_exact(tile_linear, device, m):
    bits = 1 + m % 7
    weight, codes = sliced_weight(random_codes(65, 256, bits), bits, device=device)
    tokens = token_codes(m, weight, 8, device=device)
    config = dataclasses.replace(SMALL, block_m=8 if m < 16 else 64, group_m=2)

    assert equal_to_int64(tile_linear, tokens, weight, codes, config)


def test_tokens_whose_offsets_pass_32_bits_take_several_launches(tile_linear, device, monkeypatch):
    weight, codes = sliced_weight(random_codes(65, 256, 3), 3, device=device)
    tokens = token_codes(70, weight, 8, device=device)
    config = dataclasses.replace(SMALL, splits=2)
    launches = []
    launch = tile_linear._launch  # noqa: SLF001  launches are counted
    monkeypatch.setattr(tile_linear, "MOST_OFFSET", 40 * weight.columns)
    monkeypatch.setattr(
        tile_linear, "_launch", lambda part, *rest: launches.append(part) or launch(part, *rest)
    )

    assert equal_to_int64(tile_linear, tokens, weight, codes, config)
    assert [len(part.codes) for part in launches] == [32, 32, 6]


@pytest.mark.parametrize(("slice_bytes", "block_rows"), [(32, 64), (128, 128)])
@pytest.mark.parametrize(("block_n", "bits"), [(64, 3), (256, 4)])
def test_tiles_need_not_be_those_that_are_stored(
    tile_linear, device, slice_bytes, block_rows, block_n, bits
):
    weight, codes = sliced_weight(
        random_codes(200, 600, bits), bits,
        device=device, slice_bytes=slice_bytes, block_rows=block_rows,
    )  # fmt: skip
    tokens = token_codes(3, weight, 8, device=device)
    config = dataclasses.replace(SMALL, block_n=block_n, block_k=32)

    assert equal_to_int64(tile_linear, tokens, weight, codes, config)


@pytest.mark.parametrize(("splits", "bits"), [(2, 5), (3, 2), (8, 4)])
def test_splitting_k_changes_no_bit_and_leaves_the_workspace_clean(
    tile_linear, device, splits, bits
):
    weight, codes = sliced_weight(random_codes(70, 600, bits), bits, device=device)
    tokens = token_codes(9, weight, 8, device=device)
    config = dataclasses.replace(SMALL, splits=splits)
    workspace = tile_linear.SplitWorkspace.for_launch(config, 9, 128, torch.device(device))
    expected = product_of_codes(tokens, codes, weight)

    for _ in range(2):
        actual = tile_linear.tile_linear(
            tokens, weight, out_dtype=torch.float32, config=config, workspace=workspace
        )

        assert torch.equal(actual, expected)
        assert not workspace.arrivals.any()


# groups that end inside a turn, that take several turns, and that straddle them
@pytest.mark.parametrize(("bits", "k", "groups"), [
    (1, 256, 2), (2, 256, 2), (4, 512, 4), (6, 256, 4), (7, 256, 8), (8, 256, 2), (4, 480, 5),
])  # fmt: skip
def test_group_scales_are_summed_in_rising_order(tile_linear, device, bits, k, groups):
    half_step = bits in (1, 2, 4)
    weight, codes = sliced_weight(
        random_codes(70, k, bits), bits, groups=groups, half_step=half_step,
        device=device, slice_bytes=32,
    )  # fmt: skip
    tokens = token_codes(5, weight, 6, device=device)

    assert equal_to_int64(tile_linear, tokens, weight, codes, SMALL)


def test_group_scales_split_over_programs_stay_within_rounding(tile_linear, device):
    weight, codes = sliced_weight(
        random_codes(70, 512, 4), 4, groups=4, device=device, slice_bytes=32
    )
    tokens = token_codes(5, weight, 8, device=device)
    config = dataclasses.replace(SMALL, splits=2)

    actual = tile_linear.tile_linear(tokens, weight, out_dtype=torch.float32, config=config)

    expected = product_of_codes(tokens, codes, weight)
    # four terms: each sum of two rounds once, at most the sum of their magnitudes
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(expected.abs().max()) * 2**-21)


@pytest.mark.parametrize("w_fill", [0, 255])
@pytest.mark.parametrize("x_fill", [0, 255])
@pytest.mark.parametrize("half_step", [False, True])
def test_extreme_codes_are_exact(tile_linear, device, w_fill, x_fill, half_step):
    bits = 7 if half_step else 8
    weight, codes = sliced_weight(
        random_codes(3, 512, bits, w_fill >> (8 - bits)), bits, half_step=half_step, device=device
    )
    tokens = token_codes(2, weight, 8, fill=x_fill, device=device)

    assert equal_to_int64(tile_linear, tokens, weight, codes, SMALL)


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_one_hot_weights_pick_single_activations(tile_linear, device, bits):
    rows = torch.arange(256)
    codes = torch.zeros(256, 512, dtype=torch.uint8)
    codes[rows, (rows * 37) % 512] = (1 << bits) - 1
    weight, fields = sliced_weight(codes, bits, device=device)
    tokens = token_codes(3, weight, 8, device=device)

    assert equal_to_int64(tile_linear, tokens, weight, fields, SMALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_outputs_are_the_rounded_float32(tile_linear, device, dtype):
    weight, codes = sliced_weight(random_codes(64, 256, 2), 2, device=device)
    tokens = token_codes(4, weight, 4, device=device)

    actual = tile_linear.tile_linear(tokens, weight, out_dtype=dtype, config=SMALL)

    expected = product_of_codes(tokens, codes, weight)
    assert actual.dtype == dtype
    # the interpreter cuts bfloat16 where a GPU rounds it
    one = torch.finfo(dtype).eps if dtype == torch.bfloat16 else torch.finfo(dtype).eps / 2
    assert bool(((actual.float() - expected).abs() <= one * expected.abs()).all())


def test_tokens_may_come_by_descriptor(tile_linear, device):
    weight, codes = sliced_weight(random_codes(70, 512, 3), 3, device=device)
    tokens = token_codes(33, weight, 8, device=device)
    config = dataclasses.replace(SMALL, x_tma=True)

    assert equal_to_int64(tile_linear, tokens, weight, codes, config)


@pytest.mark.parametrize("bits", [1, 4, 5, 7])
def test_codes_unpacked_once_give_the_same_bits(tile_linear, unpack, device, bits):
    weight, codes = sliced_weight(random_codes(70, 600, bits), bits, device=device)
    tokens = token_codes(5, weight, 8, device=device)

    unpacked = unpack.unpack_int8(weight)

    assert unpacked.field_bits == (8,)
    assert equal_to_int64(tile_linear, tokens, unpacked, codes, SMALL)


def test_a_scratch_that_is_too_small_is_refused(unpack):
    weight, _ = sliced_weight(random_codes(64, 256, 4), 4)

    with pytest.raises(ValueError, match="the codes take 16384"):
        unpack.unpack_int8(weight, torch.empty(100, dtype=torch.uint8))


def test_no_tokens_give_no_rows(tile_linear, device):
    weight, _ = sliced_weight(random_codes(8, 256, 4), 4, device=device)

    assert tile_linear.tile_linear(token_codes(0, weight, 8, device=device), weight).shape == (0, 8)


def test_operands_that_do_not_fit_are_refused(tile_linear):
    weight, _ = sliced_weight(random_codes(8, 512, 4), 4)
    other, _ = sliced_weight(random_codes(8, 256, 4), 4)
    tokens = token_codes(2, other, 8)
    small = tile_linear.SplitWorkspace.for_launch(SMALL, 2, 64, torch.device("cpu"))

    with pytest.raises(ValueError, match="256 columns, the weight 512"):
        tile_linear.tile_linear(tokens, weight)
    config = dataclasses.replace(SMALL, splits=2)
    with pytest.raises(ValueError, match="the workspace has 0"):
        tile_linear.tile_linear(tokens, other, config=config, workspace=small)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("m", [2, 16, 64, 300, 2048])
def test_candidates_fit_the_machine_and_start_with_the_choice(bits, m):
    shape = TileShape(bits=bits, m=m, n=4096, columns=4096, slice_bytes=128)

    configs = tile_configs(shape)

    assert 3 < len(configs) <= 24
    assert len(set(configs)) >= len(configs) - 1
    assert configs[0] == select_config(shape)
    assert all(c.block_m * c.block_n // (32 * c.num_warps) <= 128 for c in configs)


def test_a_table_overrides_the_model():
    shape = TileShape(bits=2, m=13, n=4096, columns=4096, slice_bytes=128)

    assert select_config(shape, {shape.bucket(): SMALL}) == SMALL
    assert shape.bucket().m == 16


def test_scale_groups_take_whole_slices():
    config = dataclasses.replace(SMALL, block_k=32)

    assert config.fitted((2,), 64, grouped=True).block_k == 64
    assert config.fitted((2,), 128, grouped=False).block_k == 32
