"""Which part of a group's range the grid covers.

Learnable weight clipping (OmniQuant section 3.2), one pair of logits per row and group:

    high <- sigmoid(u) high        low <- sigmoid(l) low        u = l = 4 at the start

The range can only shrink. Zero stays inside it.

Shape legend: N rows, S groups in a row.
"""

import torch
from torch import nn
from typing_extensions import override

from engine.modules.fake_quant import RangeClip, keep_range
from engine.numerics.affine import GroupRange
from engine.spec import WeightGrid

__all__ = ["FullRange", "LearnedClip", "LearnedClipping"]

INITIAL_LOGIT = 4.0
"""sigmoid(4) = 0.982 of the range."""


class FullRange:
    """Covers everything: plain min-max, nothing to train."""

    def clip_for(self, weight: torch.Tensor, grid: WeightGrid) -> RangeClip:
        """Keep the range of every group."""
        return keep_range


class LearnedClipping:
    """Gives every linear layer its own learnable clip."""

    def clip_for(self, weight: torch.Tensor, grid: WeightGrid) -> RangeClip:
        """Make the clip of one linear layer at its starting point."""
        groups = weight.shape[1] // grid.group_of(weight.shape[1])
        return LearnedClip(weight.shape[0], groups).to(weight.device)


class LearnedClip(nn.Module):
    """Narrows both ends of every group's range by a learned factor."""

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.upper = nn.Parameter(torch.full((rows, groups), INITIAL_LOGIT))
        self.lower = nn.Parameter(torch.full((rows, groups), INITIAL_LOGIT))

    @override
    def forward(self, group_range: GroupRange) -> GroupRange:
        """Clip float32 ``[N, S]`` ranges."""
        return GroupRange(
            low=group_range.low * torch.sigmoid(self.lower),
            high=group_range.high * torch.sigmoid(self.upper),
        )
