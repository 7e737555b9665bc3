"""Gradients of rounding, against differences of the function with its rounding frozen."""

import pytest
import torch

from engine.modules.fake_quant import FakeQuantLinear
from engine.numerics.affine import affine_params, fake_quantize, weight_range
from engine.numerics.straight_through import FakeQuantize
from engine.spec import PER_CHANNEL, WeightGrid

GRIDS = {
    "asymmetric": WeightGrid(bits=2, group_size=PER_CHANNEL, symmetric=False, bit_balance=False),
    "symmetric": WeightGrid(bits=3, group_size=PER_CHANNEL, symmetric=True, bit_balance=False),
    "half step": WeightGrid(
        bits=2, group_size=PER_CHANNEL, symmetric=False, bit_balance=False, half_step=True
    ),
}
ZERO_POINT = 1.0
STEP = 1e-6
SEED = 5


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


@pytest.fixture
def parts():
    """Weights of two groups, some beyond both ends; scales; offsets; all in double precision."""
    generator = torch.Generator().manual_seed(SEED)
    draw = [torch.randn(shape, generator=generator).double() for shape in ((3, 2, 16), (3, 2, 16))]
    scale = torch.rand(3, 2, 1, generator=generator).double() + 0.3
    return {"weight": draw[0] * 2, "scale": scale, "offset": draw[1] * 0.2}


def rounded(weight, scale, offset, grid):
    return FakeQuantize.apply(weight, scale, torch.full_like(scale, ZERO_POINT), offset, grid)


def frozen(parts, grid):
    """Make the straight-through function: what rounding added at this point is a constant."""
    half = 0.5 if grid.half_step else 0.0
    here = parts["weight"] / parts["scale"] + parts["offset"] + half
    added = torch.round(here) - here

    def function(weight, scale, offset):
        code = weight / scale + offset + half + added + ZERO_POINT
        # a code at either end moves with its weight; the clamp begins half a step beyond
        code = torch.where(code < -0.5, 0.0, code)
        code = torch.where(code > grid.max_code + 0.5, float(grid.max_code), code)
        return (code - ZERO_POINT - half) * scale

    return function


@pytest.mark.parametrize("name", ["weight", "scale", "offset"])
def test_gradients_are_those_of_the_straight_through_function(parts, grid, name):
    towards = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(9)).double()
    leaves = {key: value.clone().requires_grad_() for key, value in parts.items()}

    (rounded(**leaves, grid=grid) * towards).sum().backward()

    function, one = frozen(parts, grid), parts[name]
    for place in range(0, one.numel(), 3):
        step = torch.zeros(one.numel()).double()
        step[place] = STEP
        step = step.view_as(one)
        above = (function(**{**parts, name: one + step}) * towards).sum()
        below = (function(**{**parts, name: one - step}) * towards).sum()
        slope = (above - below) / (2 * STEP)
        assert float(leaves[name].grad.flatten()[place]) == pytest.approx(float(slope), abs=1e-6)


def test_some_weights_lie_beyond_the_grid_and_some_inside(parts, grid):
    # what makes the comparison above worth something
    leaves = {key: value.clone().requires_grad_() for key, value in parts.items()}

    rounded(**leaves, grid=grid).sum().backward()

    assert set(leaves["weight"].grad.unique().tolist()) == {0.0, 1.0}


def test_an_offset_moves_the_codes_that_are_stored_and_those_that_are_trained(grid):
    torch.manual_seed(SEED)
    linear = torch.nn.Linear(64, 12)
    plain = FakeQuantLinear(linear, grid, 16).codes()
    twin = FakeQuantLinear(linear, grid, 16)
    twin.offset = torch.nn.Parameter(torch.empty(12, 64).uniform_(-0.5, 0.5))
    limits = weight_range(linear.weight.detach(), PER_CHANNEL)

    trained = fake_quantize(linear.weight.detach(), limits, grid, twin.offset.detach())

    params = affine_params(limits, grid)
    codes = torch.round(trained / params.scale.float() + params.centre)
    # the sum and the product round differently where a weight lies between two codes
    assert (twin.codes() != codes).float().mean() < 0.01
    assert (twin.codes() != plain).float().mean() > 0.1
    assert int((twin.codes().int() - plain.int()).abs().max()) == 1
