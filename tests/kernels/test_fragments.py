import pytest
import torch

from kernels.activation_quant import quantize_activations
from kernels.fragments import (
    ColumnOrder,
    FragmentTokens,
    FragmentWeight,
    columns_a_token,
    fragment_product,
    weight_fragments,
    weight_planes,
)
from kernels.layouts import pack_codes
from kernels.tokens import TokenCodes
from tests.kernels.conftest import load_kernel_module


@pytest.fixture
def packing(monkeypatch, device):
    """`kernels.token_fragments` whose Triton kernel runs here."""
    interpreted = device == "cpu"
    return load_kernel_module("token_fragments", interpreted=interpreted, monkeypatch=monkeypatch)


def weight_of(codes, bits, groups=1, zero_point=0):
    n, k = codes.shape
    zero_points = torch.full((n, groups), zero_point)
    return FragmentWeight.from_stored(
        pack_codes(codes, bits), torch.ones(n, groups), zero_points, k
    )


def tokens_of(m, k, bits, device="cpu"):
    return TokenCodes.from_activations(quantize_activations(torch.randn(m, k, device=device), bits))


def unsigned(tokens):
    return tokens.codes.long() + (128 if tokens.bits == 8 else 0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n", "k"), [(16, 256), (1, 32), (37, 320), (64, 1024)])
def test_planes_come_back_from_their_fragments(bits, n, k):
    packed = pack_codes(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits)

    fragments = weight_fragments(packed)

    assert fragments.shape == (-(-n // 16), -(-k // 256), bits, 32, 4)
    assert torch.equal(weight_planes(fragments, n, packed.shape[2]), packed)


def test_a_word_is_where_the_instruction_looks_for_it():
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[3 + 8, 128 + 32 * 2 + 5] = 1

    fragments = weight_fragments(pack_codes(codes, 1))

    # row g + 8 r and half h: lane 4 g + t, word 2 h + r
    assert fragments[0, 0, 0, 4 * 3 + 2, 2 * 1 + 1] == 1 << 5
    assert fragments.count_nonzero() == 1


@pytest.mark.parametrize("order", ColumnOrder)
@pytest.mark.parametrize("w_bits", [1, 2, 3, 8])
@pytest.mark.parametrize("a_bits", range(2, 9))
def test_products_through_fragments_alone_are_the_integer_products(order, w_bits, a_bits):
    codes = torch.randint(0, 1 << w_bits, (21, 320), dtype=torch.uint8)
    tokens = tokens_of(9, 320, a_bits)

    product = fragment_product(FragmentTokens.from_tokens(tokens, order), weight_of(codes, w_bits))

    assert torch.equal(product, unsigned(tokens) @ codes.long().t())


@pytest.mark.parametrize("order", ColumnOrder)
def test_one_hot_weights_pick_single_activations(order):
    codes = torch.eye(256, dtype=torch.uint8)
    tokens = tokens_of(3, 256, 8)

    product = fragment_product(FragmentTokens.from_tokens(tokens, order), weight_of(codes, 1))

    assert torch.equal(product, unsigned(tokens))


@pytest.mark.parametrize("order", ColumnOrder)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("m", "k"), [(1, 256), (3, 40), (9, 288)])
def test_the_packing_kernel_equals_its_reference(packing, device, order, bits, m, k):
    tokens = tokens_of(m, k, bits, device)
    expected = FragmentTokens.from_tokens(tokens, order)
    out = torch.full_like(expected.words, 0x55555555)

    packed = packing.pack_token_fragments(tokens, order, out=out)

    assert torch.equal(packed.words, expected.words)
    assert packed.words is out


def test_a_buffer_of_another_shape_is_refused(packing):
    with pytest.raises(ValueError, match="the words are int32"):
        packing.pack_token_fragments(
            tokens_of(1, 256, 4), ColumnOrder.BITS, out=torch.zeros(1, dtype=torch.int32)
        )


@pytest.mark.parametrize(("bits", "columns"), [(2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_no_token_straddles_two_instructions(bits, columns):
    assert columns_a_token(bits) == columns


@pytest.mark.parametrize(
    ("groups", "zero_point", "dtype"),
    [(1, 3, torch.int32), (2, -9, torch.int8), (2, 255, torch.uint8), (2, 511, torch.int16)],
)
def test_zero_points_of_groups_take_no_more_bytes_than_they_need(groups, zero_point, dtype):
    codes = torch.zeros(5, 256, dtype=torch.uint8)

    weight = weight_of(codes, 1, groups, zero_point)

    assert weight.zero_point.dtype == dtype
    assert weight.zero_point.shape == (groups, 16)
    assert (weight.zero_point[:, :5] == zero_point).all()


def test_groups_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="4 groups of K = 256"):
        weight_of(torch.zeros(5, 256, dtype=torch.uint8), 1, groups=4)
