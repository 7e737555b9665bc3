import pytest
import torch

from engine.methods.clipping import RATIOS, FullRange, LearnedClipping, best_ratio
from engine.numerics.affine import GroupRange, fake_quantize, weight_range
from engine.spec import PER_CHANNEL, WeightGrid

W_NK = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
EVEN = torch.ones(64)


def grid_of(bits=4, group_size=PER_CHANNEL, *, symmetric=False):
    return WeightGrid(bits=bits, group_size=group_size, symmetric=symmetric, bit_balance=False)


def weighted_error(weight, group_range, grid, power):
    return float((power * (fake_quantize(weight, group_range, grid) - weight).square()).sum())


def shrunk(weight, grid, ratio):
    full = weight_range(weight, grid.group_size)
    return GroupRange(low=full.low * ratio, high=full.high * ratio)


def test_the_full_range_stays_whole():
    clip = FullRange().clip_for(W_NK, grid_of(), EVEN)
    full = weight_range(W_NK, PER_CHANNEL)

    assert clip(full) is full


@pytest.mark.parametrize("group_size", [PER_CHANNEL, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_common_ratio_beats_the_ratios_found(group_size, symmetric):
    grid = grid_of(3, group_size, symmetric=symmetric)
    power = torch.linspace(0.1, 5, 64)

    found = weighted_error(W_NK, shrunk(W_NK, grid, best_ratio(W_NK, grid, power)), grid, power)

    for ratio in RATIOS:
        assert found <= weighted_error(W_NK, shrunk(W_NK, grid, ratio), grid, power) + 1e-4


def test_an_outlier_that_no_input_reaches_is_clipped():
    weight = W_NK.clone()
    weight[3, 7] = 30.0
    silent = EVEN.clone()
    silent[7] = 0.0

    heard_ratio = best_ratio(weight, grid_of(), EVEN)
    silent_ratio = best_ratio(weight, grid_of(), silent)

    # without the outlier the row needs a tenth of the range
    assert silent_ratio[3, 0] < 0.5
    assert heard_ratio[3, 0] > 0.9


def test_a_learned_clip_starts_at_the_best_ratio():
    grid = grid_of(2)
    full = weight_range(W_NK, PER_CHANNEL)

    clipped = LearnedClipping().clip_for(W_NK, grid, EVEN)(full)

    wanted = best_ratio(W_NK, grid, EVEN).clamp(max=0.9976)
    torch.testing.assert_close(clipped.high, full.high * wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(clipped.low, full.low * wanted, rtol=1e-3, atol=0)


def test_a_learned_clip_only_shrinks_and_keeps_zero_inside():
    clip = LearnedClipping().clip_for(W_NK, grid_of(), EVEN)
    full = weight_range(W_NK, PER_CHANNEL)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.normal_(0, 10)

    clipped = clip(full)

    for low, end, high in ((full.low, clipped.low, 0.0), (0.0, clipped.high, full.high)):
        assert bool((low <= end).all())
        assert bool((end <= high).all())


def test_a_row_of_zeros_is_no_trouble():
    weight = torch.zeros(2, 64)

    clip = LearnedClipping().clip_for(weight, grid_of(), EVEN)

    assert all(bool(torch.isfinite(each).all()) for each in clip.parameters())
