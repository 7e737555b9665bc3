import dataclasses

import pytest
import torch

from kernels.decode_config import LaunchConfig, decode_configs, select_config
from kernels.decode_linear import decode_linear
from kernels.sliced import choose_slice_bytes, slice_weight, unslice_codes
from kernels.sliced_reference import sliced_linear_reference
from kernels.tokens import TokenCodes
from tests.kernels.integer_cases import (
    product_in_int64,
    random_tokens,
    random_weight,
    weight_of,
)
from tests.kernels.tile_cases import load_kernel_modules

ONE_TURN = LaunchConfig(lane_rows=16, thread_rows=4, turn_blocks=2, num_warps=4)
WIDTHS = [
    (1, 8, 1), (2, 2, 3), (3, 7, 2), (4, 4, 5), (5, 3, 1), (6, 6, 7), (7, 5, 8), (8, 8, 8),
    (2, 8, 1), (8, 2, 1),
]  # fmt: skip
SHAPES = {
    "llama-7b": (22016, 4096, 1), "llama-7b down": (4096, 11008, 1), "70b": (8192, 28672, 1),
    "small": (7, 96, 1), "groups of 128": (4096, 4096, 32), "groups of 32": (4096, 4096, 128),
}  # fmt: skip


@pytest.fixture
def decode(monkeypatch, device):
    """`kernels.decode_linear` whose Triton kernel runs here and whose outputs start as garbage."""
    original = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        fresh = original(*args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh.fill_(77)

    names = ["_decode_products", "_decode_kernel"]
    module = load_kernel_modules(names, interpreted=device == "cpu", monkeypatch=monkeypatch)
    kernel = module.decode_linear_kernel
    monkeypatch.setattr("kernels.decode_linear.decode_linear_kernel", kernel)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return decode_linear


def sliced_of(weight, **layout):
    return slice_weight(
        weight.packed, weight.scale, weight.zero_point, weight.in_features, **layout
    )


def rounding_of_groups(x, w):
    """What float32 may lose of tokens times levels ``[N, S, G]``, by sums of magnitudes.

    Of a group, a lane converts its integer and adds its product: one rounding more than groups.
    Joining up to 2^10 lanes rounds ten times, and the zero-point's term and its product, their
    difference, the token's scale and the output once each.
    """
    groups, columns = w.shape[1], w[0].numel()
    size = x.codes.cpu()[:, :columns].double().abs() + x.zero_point.cpu().abs().unsqueeze(1)
    size *= x.scale.cpu().unsqueeze(1)
    return size @ w.flatten(1).abs().t() * 2.0**-24 * (groups + 16)


def codes_of(tokens, weight):
    return TokenCodes.from_activations(tokens, groups=weight.groups, columns=weight.columns)


@pytest.mark.parametrize(("bits", "a_bits", "m"), WIDTHS)
def test_it_equals_the_int64_product_bit_for_bit(decode, device, bits, a_bits, m):
    tokens = random_tokens(m, 300, a_bits, device)
    weight = random_weight(50, 300, (1 << bits) - 1, device=device)
    bias = torch.randn(50, device=device)
    sliced = sliced_of(weight, slice_bytes=32)

    actual = decode(
        codes_of(tokens, sliced), sliced, bias, out_dtype=torch.float32, config=ONE_TURN
    )

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight, bias))


@pytest.mark.parametrize(
    ("turn_blocks", "split_k", "slice_bytes"),
    [(1, 1, 32), (2, 2, 32), (4, 3, 32), (1, 3, 64), (2, 1, 64), (4, 2, 64)],
)
def test_turns_and_splits_change_no_bit(decode, device, turn_blocks, split_k, slice_bytes):
    tokens, weight = random_tokens(2, 700, 8, device), random_weight(9, 700, 7, device=device)
    sliced = sliced_of(weight, slice_bytes=slice_bytes)
    counters = torch.zeros(1, dtype=torch.int32, device=device)
    config = dataclasses.replace(ONE_TURN, turn_blocks=turn_blocks, split_k=split_k)

    actual = decode(
        codes_of(tokens, sliced), sliced,
        out_dtype=torch.float32, config=config, counters=counters,
    )  # fmt: skip

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))
    assert not counters.any()


@pytest.mark.parametrize(("lane_rows", "thread_rows"), [(1, 8), (8, 1), (32, 2)])
def test_tiles_of_rows_change_no_bit(decode, device, lane_rows, thread_rows):
    tokens, weight = random_tokens(1, 256, 8, device), random_weight(19, 256, 15, device=device)
    sliced = sliced_of(weight, slice_bytes=32, block_rows=128)
    config = dataclasses.replace(ONE_TURN, lane_rows=lane_rows, thread_rows=thread_rows)

    actual = decode(codes_of(tokens, sliced), sliced, out_dtype=torch.float32, config=config)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


@pytest.mark.parametrize("w_fill", [0, 255])
@pytest.mark.parametrize("x_fill", [0, 255])
def test_extreme_codes_of_the_longest_rows_are_exact(decode, device, w_fill, x_fill):
    tokens = random_tokens(1, 28672, 8, device, fill=x_fill)
    weight = random_weight(2, 28672, 255, device=device, fill=w_fill)
    sliced = sliced_of(weight)
    config = LaunchConfig(lane_rows=2, thread_rows=1, turn_blocks=32, num_warps=4)

    actual = decode(codes_of(tokens, sliced), sliced, out_dtype=torch.float32, config=config)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


@pytest.mark.parametrize("max_code", [1, 7, 127])
def test_every_code_of_a_tile_meets_its_own_activation(decode, device, max_code):
    # row n holds its largest code at columns n, n + 64, n + 128 and n + 192 in turn of the test
    tokens = random_tokens(1, 256, 7, device)
    for offset in (0, 64, 128, 192):
        codes = torch.zeros(64, 256, dtype=torch.uint8)
        codes[torch.arange(64), torch.arange(64) + offset] = max_code
        weight = weight_of(codes, max_code, device=device)
        sliced = sliced_of(weight, slice_bytes=32)

        actual = decode(codes_of(tokens, sliced), sliced, out_dtype=torch.float32, config=ONE_TURN)

        assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


@pytest.mark.parametrize(
    ("group", "slice_bytes", "bits", "split_k"),
    [(32, 32, 2, 1), (64, 32, 3, 2), (128, 64, 8, 1), (128, 32, 1, 1), (256, 32, 4, 1),
     (512, 64, 7, 2), (128, 128, 6, 1)],
)  # fmt: skip
def test_group_scales_stay_within_float32_rounding(
    decode, device, group, slice_bytes, bits, split_k
):
    k = max(512, 2 * group)
    tokens = random_tokens(2, k, 8, device)
    weight = random_weight(11, k, (1 << bits) - 1, k // group, device)
    sliced = sliced_of(weight, slice_bytes=slice_bytes)
    config = dataclasses.replace(ONE_TURN, turn_blocks=2, split_k=split_k)

    def run():
        return decode(codes_of(tokens, sliced), sliced, out_dtype=torch.float32, config=config)

    actual = run()

    u = (tokens.codes.cpu().double() - tokens.zero_point.cpu()) * tokens.scale.cpu()
    codes = unslice_codes(sliced).cpu().view(11, k // group, group).double()
    w = (codes - weight.zero_point.cpu().unsqueeze(-1)) * weight.scale.cpu().double().unsqueeze(-1)
    bound = rounding_of_groups(codes_of(tokens, sliced), w)
    assert bool(((actual.cpu() - u @ w.view(11, k).t()).abs() <= bound).all())
    assert torch.equal(run(), actual)


@pytest.mark.parametrize(("k", "m", "half_step"), [(384, 1, False), (640, 2, True)])
def test_a_block_that_lacks_groups_counts_those_it_has(decode, device, k, m, half_step):
    tokens = random_tokens(m, k, 8, device)
    weight = random_weight(9, k, 3, k // 128, device)
    sliced = sliced_of(weight, half_step=half_step, slice_bytes=64)
    x = codes_of(tokens, sliced)

    actual = decode(x, sliced, out_dtype=torch.float32, config=ONE_TURN)

    expected = sliced_linear_reference(x, sliced).double().cpu()
    w = unslice_codes(sliced).cpu().view(9, -1, 128).double() * sliced.multiplier
    w = (w - sliced.zero_point[:9].cpu().unsqueeze(-1)) * sliced.scale[:9].cpu().unsqueeze(-1)
    assert bool(((actual.cpu() - expected).abs() <= 2 * rounding_of_groups(x, w)).all())


@pytest.mark.parametrize("groups", [1, 4])
def test_levels_half_a_step_apart_are_exact(decode, device, groups):
    tokens = random_tokens(2, 256, 8, device)
    weight = random_weight(10, 256, 3, groups, device)
    sliced = sliced_of(weight, half_step=True, slice_bytes=32)

    actual = decode(codes_of(tokens, sliced), sliced, out_dtype=torch.float32, config=ONE_TURN)

    u = (tokens.codes.cpu().double() - tokens.zero_point.cpu()) * tokens.scale.cpu()
    codes = unslice_codes(sliced).cpu().view(10, groups, -1).double()
    w = codes - weight.zero_point.cpu().unsqueeze(-1) - 0.5
    w = w * weight.scale.cpu().double().unsqueeze(-1)
    bound = rounding_of_groups(codes_of(tokens, sliced), w)
    assert bool(((actual.cpu() - u @ w.view(10, 256).t()).abs() <= bound).all())
    reference = sliced_linear_reference(codes_of(tokens, sliced), sliced)
    assert groups > 1 or torch.equal(actual, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_rounded_once_to_16_bits(decode, device, dtype):
    tokens, weight = random_tokens(3, 256, 4, device), random_weight(40, 256, 3, device=device)
    sliced = sliced_of(weight)

    actual = decode(codes_of(tokens, sliced), sliced, out_dtype=dtype, config=ONE_TURN)

    assert actual.dtype == dtype
    expected = product_in_int64(tokens, weight)
    if dtype == torch.bfloat16 and device == "cpu":
        # the interpreter cuts the bits off instead of rounding
        expected = (expected.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert torch.equal(actual.cpu(), expected.to(dtype))


def test_tokens_with_more_columns_than_the_weight_give_the_same_product(decode, device):
    tokens, weight = random_tokens(2, 256, 8, device), random_weight(8, 256, 15, device=device)
    sliced = sliced_of(weight, slice_bytes=32)
    wide = TokenCodes.from_activations(tokens, columns=1024)

    actual = decode(wide, sliced, out_dtype=torch.float32, config=ONE_TURN)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


def test_the_selected_launch_is_exact(decode, device):
    tokens, weight = random_tokens(1, 1024, 8, device), random_weight(24, 1024, 7, device=device)
    sliced = sliced_of(weight)

    actual = decode(codes_of(tokens, sliced), sliced, out_dtype=torch.float32)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


@pytest.mark.parametrize("a_bits", [3, 8])
@pytest.mark.parametrize(("groups", "bits"), [(1, 8), (4, 3)])
def test_the_reference_equals_the_int64_product(a_bits, groups, bits):
    tokens = random_tokens(9, 256, a_bits)
    weight = random_weight(33, 256, (1 << bits) - 1, groups)
    sliced, bias = sliced_of(weight), torch.randn(33)

    actual = sliced_linear_reference(codes_of(tokens, sliced), sliced, bias)

    assert torch.equal(actual, product_in_int64(tokens, weight, bias))


@pytest.mark.parametrize(
    ("m", "change", "message"),
    [
        (0, {}, "0 tokens"),
        (9, {}, "9 tokens"),
        (1, {"lane_rows": 32, "thread_rows": 4}, "128 rows do not divide"),
    ],
)
def test_launches_that_do_not_fit_are_refused(decode, device, m, change, message):
    sliced = sliced_of(random_weight(8, 256, 3, device=device))
    tokens = codes_of(random_tokens(m, 256, 8, device), sliced)

    with pytest.raises(ValueError, match=message):
        decode(tokens, sliced, config=dataclasses.replace(ONE_TURN, **change))


def test_operands_that_do_not_fit_each_other_are_refused(decode, device):
    sliced = sliced_of(random_weight(8, 256, 3, device=device))
    tokens = random_tokens(1, 256, 8, device)
    grouped = sliced_of(random_weight(8, 288, 3, 3, device=device))

    with pytest.raises(ValueError, match="2 groups, the weight 1"):
        decode(TokenCodes.from_activations(tokens, groups=2, columns=sliced.columns), sliced)
    with pytest.raises(ValueError, match="tokens have 256 columns, the weight 512"):
        decode(
            TokenCodes.from_activations(tokens),
            sliced_of(random_weight(8, 300, 3, device=device)),
        )
    with pytest.raises(ValueError, match="a group of 96 columns is 3 slices"):
        decode(codes_of(random_tokens(1, 288, 8, device), grouped), grouped)
    with pytest.raises(ValueError, match="out_dtype"):
        decode(codes_of(tokens, sliced), sliced, out_dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("m", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_candidates_are_few_different_and_launchable(bits, m, shape):
    n, k, groups = shape
    g = choose_slice_bytes(k, groups)
    columns = -(-k // (8 * g)) * 8 * g
    facts = {
        "bits": bits, "n": n, "columns": columns, "slice_bytes": g, "m": m, "grouped": groups > 1,
    }  # fmt: skip

    configs = decode_configs(**facts)

    assert 1 < len(configs) <= 24
    assert len(set(configs)) == len(configs)
    assert configs[0] == select_config(**facts)
    assert not configs[-1].launch_pdl
    assert all(64 % config.rows == 0 for config in configs)


def test_a_matrix_of_many_rows_needs_no_split():
    config = select_config(bits=2, n=22016, columns=4096, slice_bytes=128, m=1)

    assert config.split_k == 1
    assert config.turn_blocks * 1024 == 4096
