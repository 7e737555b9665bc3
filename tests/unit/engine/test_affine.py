import pytest
import torch

from engine.numerics.affine import (
    GroupRange,
    affine_params,
    dequantize_weight,
    doubled_codes,
    fake_quantize,
    quantize_weight,
    weight_range,
)
from engine.spec import PER_CHANNEL, QuantSpec, WeightGrid
from kernels.activation_quant import dequantize_activations, quantize_activations
from kernels.activation_rounding import round_activations

GRIDS = [
    WeightGrid(bits=bits, group_size=group, symmetric=symmetric, bit_balance=balance)
    for bits in range(1, 9)
    for group in (PER_CHANNEL, 32)
    for symmetric in (False, True)
    for balance in (False, True)
    if not (balance and bits > 2) and not (symmetric and bits == 1 and not balance)
]


def grid_of(notation, **fields):
    return QuantSpec.from_notation(notation, **fields).weight_grid("any")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_error_stays_within_half_a_step(grid):
    w = torch.randn(20, 96)
    params = affine_params(weight_range(w, grid.group_size), grid)

    restored = dequantize_weight(quantize_weight(w, params, grid), params)

    step = params.scale.float().repeat_interleave(96 // params.scale.shape[1], dim=1)
    # zero lies on the grid, so the ends of a range may be cut: half a step more, and the
    # rounding of the scale to float16
    assert bool(((restored - w).abs() <= step * 1.02).all())
    assert float(((restored - w).abs() / step).mean()) < 0.3


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_differentiable_path_has_the_values_of_the_stored_one(grid):
    w = torch.randn(20, 96) * torch.logspace(-4, 1, 20)[:, None]
    limits = weight_range(w, grid.group_size)
    params = affine_params(limits, grid)

    stored = dequantize_weight(quantize_weight(w, params, grid), params)

    assert torch.equal(fake_quantize(w, limits, grid), stored)


def test_zero_is_always_a_level():
    w = torch.rand(8, 64) + 5
    w[:, 3] = 0
    grid = grid_of("w2a16")
    params = affine_params(weight_range(w, PER_CHANNEL), grid)

    assert not dequantize_weight(quantize_weight(w, params, grid), params)[:, 3].any()
    assert not params.zero_point.any()


def test_a_symmetric_grid_has_its_zero_in_the_middle():
    w = torch.randn(4, 32) + 1
    params = affine_params(weight_range(w, PER_CHANNEL), grid_of("w4a16", symmetric=True))

    assert params.zero_point.unique().tolist() == [7]
    torch.testing.assert_close(params.scale[:, 0].float(), w.abs().amax(1) / 7, rtol=1e-3, atol=0)


def test_bit_balance_has_five_levels():
    w = torch.linspace(-2, 2, 64).repeat(2, 1)
    grid = grid_of("w2*a16")
    params = affine_params(weight_range(w, PER_CHANNEL), grid)

    codes = quantize_weight(w, params, grid)

    assert codes.unique().tolist() == [0, 1, 2, 3, 4]
    assert dequantize_weight(codes, params).unique().tolist() == [-2, -1, 0, 1, 2]


def test_ties_round_to_even():
    w = torch.tensor([[0.5, 1.5, 2.5, 15.0]])
    grid = grid_of("w4a16")
    params = affine_params(weight_range(w, PER_CHANNEL), grid)

    assert quantize_weight(w, params, grid).tolist() == [[0, 2, 2, 15]]


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-9, 6e4])
def test_a_constant_group_is_restored(value):
    w = torch.full((2, 32), value)
    grid = grid_of("w4a16")
    params = affine_params(weight_range(w, PER_CHANNEL), grid)

    restored = dequantize_weight(quantize_weight(w, params, grid), params)

    torch.testing.assert_close(restored, w, rtol=1e-3, atol=1e-5)


def test_a_clipped_range_clips_the_outlier_and_refines_the_rest():
    w = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([20.0])])[None]
    grid = grid_of("w4a16")
    whole = weight_range(w, PER_CHANNEL)
    clipped = GroupRange(low=whole.low, high=whole.high * 0.05)

    error = (fake_quantize(w, clipped, grid) - w).abs()

    assert error[0, 31] == pytest.approx(19, rel=0.01)
    assert error[0, :31].max() < (fake_quantize(w, whole, grid) - w).abs()[0, :31].max()


def test_the_gradient_reaches_the_range_through_the_scale():
    w = torch.randn(4, 64)
    whole = weight_range(w, 32)
    factor = torch.full_like(whole.high, 0.9, requires_grad=True)
    clipped = GroupRange(low=whole.low * factor, high=whole.high * factor)

    loss = (fake_quantize(w, clipped, grid_of("w2a16g32")) - w).pow(2).mean()
    loss.backward()

    assert bool((factor.grad != 0).all())


def test_the_gradient_follows_the_formula():
    # inside the range d(w_hat)/d(scale) = q - w / scale, beyond it the clipped code
    w = torch.tensor([[0.3, 1.2, 9.0, -0.4]])
    top = torch.tensor([[3.0]], requires_grad=True)
    low = torch.tensor([[-1.0]])

    out = fake_quantize(w, GroupRange(low=low, high=top), grid_of("w2a16"))
    out.sum().backward()

    scale, zero = 4 / 3, 1
    q = [0, 1, 2, 0]
    inside = [code - each / scale for code, each in zip(q, w[0].tolist(), strict=True)]
    expected = (inside[0] + inside[1] + (3 - zero) + inside[3]) / 3
    assert float(top.grad) == pytest.approx(expected, rel=1e-3)


def test_weights_outside_the_range_get_no_gradient():
    w = torch.tensor([[0.5, 5.0]], requires_grad=True)
    limits = GroupRange(low=torch.zeros(1, 1), high=torch.ones(1, 1))

    fake_quantize(w, limits, grid_of("w4a16")).sum().backward()

    assert w.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantized_activations_equal_the_kernels(bits):
    x = torch.randn(3, 5, 48)

    expected = dequantize_activations(quantize_activations(x.view(15, 48), bits)).view_as(x)

    assert torch.equal(round_activations(x, bits), expected)


def test_activations_pass_gradients_through():
    x = torch.randn(4, 32, requires_grad=True)

    (round_activations(x, 8) * torch.arange(32)).sum().backward()

    assert float(x.grad[:, 5].mean()) == pytest.approx(5, abs=2)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group_size 64 does not divide K = 96"):
        weight_range(torch.zeros(2, 96), 64)


HALF_STEPS = WeightGrid(bits=2, group_size=32, symmetric=False, bit_balance=False, half_step=True)


def test_a_half_step_grid_has_four_exact_levels_around_zero():
    w = torch.linspace(-3, 3, 64).repeat(2, 1)
    grid = grid_of("w2a16", half_step=True)
    params = affine_params(weight_range(w, PER_CHANNEL), grid)

    codes = quantize_weight(w, params, grid)

    assert codes.unique().tolist() == [0, 1, 2, 3]
    assert params.scale.unique().tolist() == [2.0]
    assert dequantize_weight(codes, params).unique().tolist() == [-3, -1, 1, 3]


def test_a_half_step_grid_rounds_to_the_nearest_level():
    w = torch.randn(20, 96)
    params = affine_params(weight_range(w, 32), HALF_STEPS)
    scale = params.scale.float().repeat_interleave(32, dim=1)
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5]) * scale[..., None]

    restored = dequantize_weight(quantize_weight(w, params, HALF_STEPS), params)

    nearest = (levels - w[..., None]).abs().amin(-1)
    torch.testing.assert_close((restored - w).abs(), nearest)


@pytest.mark.parametrize("grid", [*GRIDS, HALF_STEPS], ids=str)
def test_what_a_grid_covers_places_it_again(grid):
    w = torch.randn(20, 96) * torch.logspace(-4, 1, 20)[:, None]
    placed = affine_params(weight_range(w, grid.group_size), grid)

    again = affine_params(placed.covered_range(grid), grid)

    assert torch.equal(again.scale, placed.scale)
    assert torch.equal(again.zero_point, placed.zero_point)


@pytest.mark.parametrize("smallest", [1e-5, 1.0])
def test_doubled_codes_are_the_same_weight_exactly(smallest):
    w = torch.randn(20, 96) * smallest
    params = affine_params(weight_range(w, 32), HALF_STEPS)
    codes = quantize_weight(w, params, HALF_STEPS)

    doubled, whole = doubled_codes(codes, params)

    assert not whole.half_step
    assert int(doubled.max()) <= 6
    assert torch.equal(dequantize_weight(doubled, whole), dequantize_weight(codes, params))
