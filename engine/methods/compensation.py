"""Distribution compensation (ABQ-LLM eq. 3): a rank-1 change of down_proj before it is rounded.

    W' = W + a b^T        a [N] starts at 0, b [K] at 1

It nudges ranges and rounding and is folded into the codes: nothing is stored beside them. As in the
published code it is learned in the first three and the last four layers.

Shape legend: N outputs, K inputs.
"""

import torch
from torch import nn
from typing_extensions import override

__all__ = ["RankOne", "is_compensated"]

FIRST, LAST = 3, 4


class RankOne(nn.Module):
    """Adds a learned outer product to a weight."""

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(out_features, 1, device=device))
        self.b = nn.Parameter(torch.ones(1, in_features, device=device))

    @override
    def forward(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Change ``[N, K]``; the bias stays."""
        return weight + self.a @ self.b, bias

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs stay as they are."""
        return x


def is_compensated(index: int, layers: int) -> bool:
    """Whether a decoder layer is among the first or last ones."""
    return index < FIRST or index >= layers - LAST
