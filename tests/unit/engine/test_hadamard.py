import hashlib
import math

import pytest
import torch

from engine.numerics.hadamard import (
    Factors,
    factors_of,
    hadamard,
    hadamard_matrix,
    random_signs,
    rotate_columns,
    rotate_rows,
)
from engine.orders import MAX_ORDER, Construction, block_of, construction_of, factors

ORDERS = [order for order in range(1, MAX_ORDER + 1) if construction_of(order)]
SIZES = [1, 2, 12, 20, 28, 64, 96, 128, 148, 576, 896, 1536]
BLOCKED = [(11008, 256), (3 * 64, 192), (5 * 32, 160), (7, 1), (90, 2)]


def dense(n):
    parts = factors_of(n)
    return torch.kron(parts.left, parts.right) / math.sqrt(n)


@pytest.mark.parametrize("order", ORDERS)
def test_a_matrix_has_signs_as_entries_and_orthogonal_rows(order):
    matrix = hadamard_matrix(order)

    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize(
    ("order", "construction"),
    [
        (64, Construction.SYLVESTER),
        (12, Construction.PALEY_I),
        (28, Construction.PALEY_II),
        (112, Construction.DOUBLED),
        (92, None),
        (6, None),
        (1024, None),
    ],
)
def test_an_order_is_built_by_the_first_rule_that_fits(order, construction):
    assert construction_of(order) is construction


def test_the_matrices_are_those_of_the_formulas():
    assert hadamard_matrix(4).tolist() == [
        [1, 1, 1, 1],
        [1, -1, 1, -1],
        [1, 1, -1, -1],
        [1, -1, -1, 1],
    ]
    # the squares modulo 11 are 1, 3, 4, 5, 9; entry j of this row is that of -j, and 1 for j = 0
    assert hadamard_matrix(12)[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]


def test_an_order_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="order 92"):
        hadamard_matrix(92)
    with pytest.raises(ValueError, match="order 11008 is known here; use 256"):
        factors_of(11008)


@pytest.mark.parametrize(
    ("n", "split"),
    [(576, (24, 24)), (1536, (32, 48)), (4096, (64, 64)), (14336, (112, 128)), (11008, None)],
)
def test_sizes_of_models_split_into_balanced_orders(n, split):
    assert factors(n) == split


@pytest.mark.parametrize(("n", "block"), BLOCKED)
def test_what_does_not_split_is_transformed_in_its_largest_block(n, block):
    assert block_of(n) == block


@pytest.mark.parametrize("n", SIZES)
def test_the_transform_is_orthonormal_and_equals_the_dense_product(n):
    matrix = hadamard(torch.eye(n), factors_of(n))

    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix, dense(n), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [*SIZES, 4096, 14336, 11008])
def test_the_inverse_gives_back_the_input(n):
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0))
    parts = factors_of(block_of(n))

    back = hadamard(hadamard(x, parts), parts, inverse=True)

    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_blocks_do_not_mix():
    x = torch.zeros(3 * 8)
    x[8] = 1

    mixed = hadamard(x, factors_of(8))

    assert mixed[:8].eq(0).all()
    assert mixed[16:].eq(0).all()
    torch.testing.assert_close(mixed[8:16].abs(), torch.full((8,), 1 / math.sqrt(8)))


def test_a_block_that_does_not_divide_the_channels_is_refused():
    with pytest.raises(ValueError, match="block of 12 does not divide 64"):
        hadamard(torch.ones(64), factors_of(12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays_and_half_precision_is_rounded_once(dtype):
    x = torch.randn(4, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = factors_of(576)

    mixed = hadamard(x, parts)

    wanted = hadamard(x.double(), parts)
    assert mixed.dtype == dtype
    rounding = torch.finfo(max(dtype, torch.float32, key=lambda each: torch.finfo(each).eps)).eps
    torch.testing.assert_close(mixed.double(), wanted, rtol=rounding, atol=16 * 1.2e-7)


def test_the_gradient_flows_through_the_transform():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    parts = factors_of(24)

    assert torch.autograd.gradcheck(lambda each: hadamard(each, parts), x)
    assert torch.autograd.gradcheck(lambda each: hadamard(each, parts, inverse=True), x)


def test_a_gradient_flows_also_where_the_matrix_was_first_asked_for_in_inference():
    hadamard_matrix.cache_clear()
    random_signs.cache_clear()
    with torch.inference_mode():
        parts, signs = factors_of(48), random_signs(48, 1)
    x = torch.randn(2, 48, requires_grad=True)

    (hadamard(x * signs, Factors(left=parts.left, right=parts.right)) ** 2).sum().backward()

    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "block"), [(1536, 1536), (192, 64)])
def test_a_layer_of_rotated_columns_and_inputs_computes_the_same(k, block):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, k, generator=generator), torch.randn(7, k, generator=generator)

    y = hadamard(x, factors_of(block)) @ rotate_columns(w, block).T

    torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-4)


def test_rotated_rows_rotate_the_output():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 7, generator=generator), torch.randn(48, 7, generator=generator)
    bias = torch.randn(48, generator=generator)

    y = x @ rotate_rows(w, 24).T + rotate_rows(bias, 24)

    torch.testing.assert_close(y, hadamard(x @ w.T + bias, factors_of(24)), rtol=1e-5, atol=1e-5)


def test_signs_follow_the_published_formula_and_never_change():
    digest = hashlib.shake_256(b"abq-signs:20:7").digest(3)
    bits = [byte >> bit & 1 for byte in digest for bit in range(8)][:20]

    signs = random_signs(20, 7)

    assert signs.tolist() == [-1.0 if bit else 1.0 for bit in bits]
    # written down once: a checkpoint of today must be readable in years
    assert random_signs(8, 0).tolist() == [1, -1, -1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize("other", [(576, 1), (577, 0)])
def test_signs_depend_on_size_and_seed(other):
    assert not torch.equal(random_signs(*other)[:576], random_signs(576, 0))


def test_signs_are_balanced():
    assert abs(random_signs(4096, 0).mean()) < 0.1


def test_an_outlier_channel_is_spread_over_all_channels():
    x = torch.randn(16, 576, generator=torch.Generator().manual_seed(0))
    x[:, 17] *= 100

    mixed = hadamard(x * random_signs(576, 0), factors_of(576))

    def peak(each):
        return float((each.abs().amax(-1) / each.square().mean(-1).sqrt()).mean())

    assert peak(x) > 10
    # sqrt(2 log 576) = 3.6 for normal values, and the outlier adds its share
    assert peak(mixed) < 5
