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

__all__ = ["FullRange", "LearnedClip", "LearnedClipping", "best_ratio"]

RATIOS = tuple(1 - step / 25 for step in range(16))
"""1.00 down to 0.40."""
MAX_LOGIT = 6.0
"""sigmoid(6) = 0.9975: nearly all of the range, with a gradient left to learn by."""


class FullRange:
    """Covers everything: plain min-max, nothing to train."""

    def clip_for(
        self, weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor
    ) -> RangeClip:
        """Keep the range of every group."""
        return keep_range


class LearnedClipping:
    """Gives every linear layer its own learnable clip."""

    def clip_for(
        self, weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor
    ) -> RangeClip:
        """Make the clip of one linear layer at its starting point."""
        ratio_NS = best_ratio(weight, grid, input_power)
        return LearnedClip(torch.logit(ratio_NS).clamp(max=MAX_LOGIT))


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
