import pytest
import torch

from kernels.int_linear import (
    PackedWeight,
    integer_linear,
    integer_linear_reference,
    select_config,
)
from tests.kernels.integer_cases import (
    product_in_int64,
    random_tokens,
    random_weight,
    weight_of,
)

MAX_CODES = {
    "w1": 1, "w1*": 2, "w2": 3, "w2*": 4, "w3": 7, "w4": 15, "w5": 31, "w6": 63, "w7": 127,
    "w8": 255,
}  # fmt: skip
SHAPES = [(1, 1, 32), (16, 64, 32), (3, 65, 33), (17, 70, 100), (65, 7, 288)]


@pytest.mark.parametrize("max_code", MAX_CODES.values(), ids=MAX_CODES)
@pytest.mark.parametrize("a_bits", range(2, 9))
def test_the_reference_is_exact_at_every_pair_of_widths(max_code, a_bits):
    tokens, weight = random_tokens(9, 320, a_bits), random_weight(33, 320, max_code, groups=5)

    expected = product_in_int64(tokens, weight)

    assert torch.equal(integer_linear_reference(tokens, weight), expected)
    assert torch.equal(integer_linear(tokens, weight), expected)


@pytest.mark.parametrize("max_code", MAX_CODES.values(), ids=MAX_CODES)
@pytest.mark.parametrize("a_bits", [2, 5, 8])
def test_the_kernel_equals_the_reference_bit_for_bit(
    int_linear, poisoned_empty, device, max_code, a_bits
):
    tokens = random_tokens(5, 192, a_bits, device)
    weight = random_weight(70, 192, max_code, groups=3, device=device)
    bias = torch.randn(70, device=device)

    actual = int_linear.launch_integer_linear(tokens, weight, bias)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight, bias))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_code", [7, 255])
def test_the_kernel_writes_every_element_of_odd_shapes(
    int_linear, poisoned_empty, device, shape, max_code
):
    m, n, k = shape
    tokens, weight = random_tokens(m, k, 8, device), random_weight(n, k, max_code, device=device)

    actual = int_linear.launch_integer_linear(tokens, weight)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_groups_of_32_64_96_and_whole_rows_agree(int_linear, device, groups):
    # 9 groups of 32, 3 of 96, 2 of 144 is no multiple of 32 and is refused
    tokens = random_tokens(4, 288, 6, device)
    if groups == 2:
        with pytest.raises(ValueError, match="do not cut"):
            random_weight(20, 288, 15, groups)
        return
    weight = random_weight(20, 288, 15, groups, device)

    actual = int_linear.launch_integer_linear(tokens, weight)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


@pytest.mark.parametrize("w_fill", [0, 255])
@pytest.mark.parametrize("x_fill", [0, 255])
def test_extreme_codes_are_exact(int_linear, device, w_fill, x_fill):
    tokens = random_tokens(2, 512, 8, device, fill=x_fill)
    weight = random_weight(3, 512, 255, device=device, fill=w_fill)
    expected = product_in_int64(tokens, weight)

    assert torch.equal(int_linear.launch_integer_linear(tokens, weight).cpu(), expected)
    assert torch.equal(integer_linear_reference(tokens, weight).cpu(), expected)


def test_one_hot_weights_pick_single_activations(int_linear, device):
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    codes.fill_diagonal_(5)
    weight = weight_of(codes, 7, device=device)
    tokens = random_tokens(3, 64, 8, device)

    actual = int_linear.launch_integer_linear(tokens, weight)

    assert torch.equal(actual.cpu(), product_in_int64(tokens, weight))


def test_strided_codes_give_the_same_product(int_linear, device):
    tokens, weight = random_tokens(6, 96, 8, device), random_weight(8, 96, 15, device=device)
    wide = torch.zeros(6, 192, dtype=torch.uint8, device=device)
    wide[:, ::2] = tokens.codes
    strided = type(tokens)(
        codes=wide[:, ::2], scale=tokens.scale, zero_point=tokens.zero_point, bits=8
    )

    actual = int_linear.launch_integer_linear(strided, weight)

    assert torch.equal(actual, int_linear.launch_integer_linear(tokens, weight))


def test_no_tokens_give_no_rows(int_linear, device):
    tokens, weight = random_tokens(0, 64, 8, device), random_weight(8, 64, 15, device=device)

    assert int_linear.launch_integer_linear(tokens, weight).shape == (0, 8)


def test_the_longest_rows_of_8_bits_are_refused_where_int32_ends():
    with pytest.raises(ValueError, match="overflows int32"):
        PackedWeight.from_stored(
            torch.zeros(8, 1, 1040, dtype=torch.int32),
            torch.ones(1, 1, dtype=torch.float16),
            torch.zeros(1, 1, dtype=torch.uint8),
            33280,
        )


@pytest.mark.parametrize(
    ("scale", "in_features"), [((4, 1), 96), ((3, 1), 64), ((4, 4), 64), ((4, 3), 64)]
)
def test_tensors_that_do_not_make_a_weight_are_refused(scale, in_features):
    packed = torch.zeros(2, 4, 2, dtype=torch.int32)

    with pytest.raises(ValueError, match="K = "):
        PackedWeight.from_stored(
            packed, torch.ones(scale).half(), torch.zeros(scale, dtype=torch.uint8), in_features
        )


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="K = 64"):
        integer_linear(random_tokens(1, 64, 8), random_weight(4, 96, 15))


@pytest.mark.parametrize(
    ("k", "groups", "block_k"), [(4096, 1, 64), (4096, 32, 64), (288, 3, 32), (64, 2, 32)]
)
def test_a_step_along_k_never_leaves_its_group(k, groups, block_k):
    config = select_config(1, k, groups)

    assert config.block_k == block_k
    assert groups == 1 or (k // groups) % config.block_k == 0


@pytest.mark.parametrize(("m", "block_m"), [(1, 16), (16, 16), (17, 32), (64, 64), (5000, 64)])
def test_the_tile_grows_with_the_batch_up_to_64(m, block_m):
    assert select_config(m, 4096, 1).block_m == block_m
