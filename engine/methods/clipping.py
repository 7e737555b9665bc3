"""Which part of a group's range the grid covers.

Learnable weight clipping (OmniQuant section 3.2), one pair of logits per row and group:

    high <- sigmoid(u) high        low <- sigmoid(l) low

The range can only shrink. Zero stays inside it. OmniQuant starts at u = l = 4 everywhere and
needs thousands of steps; here both start where the error of the layer's output is least if its
inputs are independent,

    c = argmin over c of  sum_k E[x_k^2] (w_k - rounded_c(w_k))^2        u = l = logit(c)

which alone gains most of what training gains (docs/calibration.md).

Shape legend: N rows, K columns, G columns in a group, S = K / G groups.
"""

import math

import torch
from torch import nn
from typing_extensions import override

from engine.modules.fake_quant import RangeClip, keep_range
from engine.numerics.affine import (
    GroupRange,
    affine_params,
    dequantize_weight,
    quantize_weight,
    weight_range,
)
from engine.spec import WeightGrid

__all__ = [
    "FactorClipping",
    "FullRange",
    "LearnedClip",
    "LearnedClipping",
    "SearchedClipping",
    "best_ratio",
]

RATIOS = tuple(1 - step / 25 for step in range(16))
"""1.00 down to 0.40."""
MIN_RANGE_FACTOR = 0.05
MAX_LOGIT = 6.0
"""sigmoid(6) = 0.9975: nearly all of the range, with a gradient left to learn by."""


class FullRange:
    """Covers everything: plain min-max, nothing to train."""

    def clip_for(
        self, weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor
    ) -> RangeClip:
        """Keep the range of every group."""
        return keep_range


class SearchedClipping:
    """Narrows both ends by the common factor that rounds best; nothing to train."""

    def clip_for(
        self, weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor
    ) -> RangeClip:
        """Search the factor of every group of one linear layer."""
        ratio_NS = best_ratio(weight, grid, input_power)

        def narrow(group_range: GroupRange) -> GroupRange:
            return GroupRange(low=group_range.low * ratio_NS, high=group_range.high * ratio_NS)

        return narrow


class LearnedClipping:
    """Gives every linear layer its own learnable clip (LWC)."""

    def __init__(self, start_logit: float | None = None) -> None:
        """Start at one logit everywhere, as OmniQuant does at 4; None starts by search."""
        self._start_logit = start_logit

    def clip_for(
        self, weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor
    ) -> RangeClip:
        """Make the clip of one linear layer at its starting point."""
        if self._start_logit is not None:
            high_NS = weight_range(weight, grid.group_size).high
            return LearnedClip(torch.full_like(high_NS, self._start_logit))
        ratio_NS = best_ratio(weight, grid, input_power)
        return LearnedClip(torch.logit(ratio_NS).clamp(max=MAX_LOGIT))


class FactorClipping:
    """Gives both ends of every group a factor that starts at one and may grow.

    So step and zero-point are trained beside the rounding (EfficientQAT's Block-AP).
    """

    def clip_for(
        self, weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor
    ) -> RangeClip:
        """Make the factors of one linear layer."""
        like_NS = weight_range(weight, grid.group_size).high
        return RangeFactors(like_NS)


class RangeFactors(nn.Module):
    """Moves both ends of every group's range by learned factors."""

    def __init__(self, like_NS: torch.Tensor) -> None:
        super().__init__()
        self.upper = nn.Parameter(torch.ones_like(like_NS))
        self.lower = nn.Parameter(torch.ones_like(like_NS))

    @override
    def forward(self, group_range: GroupRange) -> GroupRange:
        """Move float32 ``[N, S]`` ends; zero stays inside."""
        return GroupRange(
            low=group_range.low * self.lower.clamp(min=MIN_RANGE_FACTOR),
            high=group_range.high * self.upper.clamp(min=MIN_RANGE_FACTOR),
        )


class LearnedClip(nn.Module):
    """Narrows both ends of every group's range by a learned factor."""

    def __init__(self, start_NS: torch.Tensor) -> None:
        super().__init__()
        self.upper = nn.Parameter(start_NS.clone())
        self.lower = nn.Parameter(start_NS.clone())

    @override
    def forward(self, group_range: GroupRange) -> GroupRange:
        """Clip float32 ``[N, S]`` ranges."""
        return GroupRange(
            low=group_range.low * torch.sigmoid(self.lower),
            high=group_range.high * torch.sigmoid(self.upper),
        )


@torch.no_grad()
def best_ratio(weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor) -> torch.Tensor:
    """Find the part of every group's range that rounds with the least weighted error.

    Args:
        weight: float ``[N, K]``.
        grid: of this layer.
        input_power: float32 ``[K]``, mean square of each input.

    Returns:
        float32 ``[N, S]``, each one of `RATIOS`.
    """
    full = weight_range(weight, grid.group_size)
    best_NS = torch.full_like(full.high, math.inf)
    ratio_NS = torch.ones_like(full.high)
    for ratio in RATIOS:
        params = affine_params(GroupRange(low=full.low * ratio, high=full.high * ratio), grid)
        rounded_NK = dequantize_weight(quantize_weight(weight, params, grid), params)
        error_NK = (rounded_NK - weight).square_().mul_(input_power)
        error_NS = error_NK.view(*full.high.shape, -1).sum(-1)
        ratio_NS[error_NS < best_NS] = ratio
        best_NS = torch.minimum(best_NS, error_NS)
    return ratio_NS
