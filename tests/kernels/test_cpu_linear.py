import pytest
import torch

import kernels.cpu_linear
from kernels.cpu_linear import cpu_linear, prepare_cpu_weight
from kernels.int_linear import integer_linear_reference
from kernels.layouts import unpack_codes
from tests.kernels.integer_cases import product_in_int64, random_tokens, random_weight


def prepared(weight):
    codes = unpack_codes(weight.packed, weight.in_features)
    return prepare_cpu_weight(codes, weight.scale, weight.zero_point)


@pytest.mark.parametrize("max_code", [1, 4, 15, 127, 255])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("m", [0, 1, 33, 300])
def test_it_equals_the_reference_bit_for_bit(max_code, groups, m):
    tokens, weight = random_tokens(m, 256, 8), random_weight(40, 256, max_code, groups)
    bias = torch.randn(40)

    actual = cpu_linear(tokens, prepared(weight), bias)

    assert torch.equal(actual, integer_linear_reference(tokens, weight, bias))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 33), (7, 65), (129, 31)])
def test_odd_shapes_are_exact(n, k):
    tokens, weight = random_tokens(3, k, 8), random_weight(n, k, 255)

    assert torch.equal(cpu_linear(tokens, prepared(weight)), product_in_int64(tokens, weight))


@pytest.mark.parametrize("w_fill", [0, 255])
@pytest.mark.parametrize("x_fill", [0, 255])
def test_extreme_codes_of_the_longest_rows_are_exact(w_fill, x_fill):
    tokens = random_tokens(1, 28672, 8, fill=x_fill)
    weight = random_weight(2, 28672, 255, fill=w_fill)

    assert torch.equal(cpu_linear(tokens, prepared(weight)), product_in_int64(tokens, weight))


@pytest.mark.parametrize("max_code", [15, 255])
def test_a_machine_whose_int8_product_saturates_multiplies_floats_and_stays_exact(
    monkeypatch, max_code
):
    monkeypatch.setattr(kernels.cpu_linear, "_int8_products_are_exact", lambda: False)
    tokens, weight = random_tokens(5, 4096, 8), random_weight(9, 4096, max_code, groups=2)

    operand = prepared(weight)

    assert operand.columns[0].dtype in {torch.float32, torch.float64}
    assert torch.equal(cpu_linear(tokens, operand), product_in_int64(tokens, weight))


def test_a_token_gives_the_same_bits_alone_and_in_a_batch():
    tokens, weight = random_tokens(64, 576, 8), random_weight(192, 576, 15, groups=9)
    operand = prepared(weight)

    together = cpu_linear(tokens, operand)

    for row in (0, 17, 63):
        alone = type(tokens)(
            codes=tokens.codes[row : row + 1],
            scale=tokens.scale[row : row + 1],
            zero_point=tokens.zero_point[row : row + 1],
            bits=8,
        )
        assert torch.equal(cpu_linear(alone, operand)[0], together[row])


def test_a_marked_token_stays_marked_and_touches_no_other():
    tokens, weight = random_tokens(3, 64, 8), random_weight(8, 64, 15)
    clean = cpu_linear(tokens, prepared(weight))
    tokens.scale[1] = float("nan")

    marked = cpu_linear(tokens, prepared(weight))

    assert bool(marked[1].isnan().all())
    assert torch.equal(marked[[0, 2]], clean[[0, 2]])


def test_the_operand_costs_one_byte_a_weight():
    operand = prepared(random_weight(64, 256, 15))

    assert sum(each.nbytes for each in operand.columns) == 64 * 256
