"""What a calibration method is made of: four independent questions, one Protocol each.

Transform: how is the block rewritten, without changing its function, before it is rounded?
Clipping: which part of a group's range does the grid cover?
Rounding: which code does each weight get?
Loss: what is a wrong block output worth?
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from engine.modules.fake_quant import RangeClip
from engine.numerics.affine import AffineParams
from engine.spec import WeightGrid

__all__ = ["Clipping", "Loss", "Method", "Rounding", "Transform"]


class Transform(Protocol):
    """Rewrites a block so that it rounds better; its full-precision function stays the same."""

    def apply(self, block: nn.Module) -> None:
        """Change the weights of a decoder layer in place, before its linears are swapped."""


class Clipping(Protocol):
    """Narrows the range that the grid of a linear layer covers."""

    def clip_for(
        self, weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor
    ) -> RangeClip:
        """Make the clip of one linear layer; a module with parameters is trained.

        Args:
            weight: float ``[N, K]``.
            grid: of this layer.
            input_power: float32 ``[K]``, mean square of each input of the quantized chain.
        """


class Rounding(Protocol):
    """Chooses codes."""

    def codes(self, weight: torch.Tensor, params: AffineParams, grid: WeightGrid) -> torch.Tensor:
        """Round float ``[N, K]`` to uint8 codes ``[N, K]`` on a grid that is placed."""


class Loss(Protocol):
    """Compares block outputs."""

    def __call__(self, seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Compare outputs ``[B, T, H]`` of the quantized and the full-precision chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One answer to each question, and how fast to learn."""

    transforms: tuple[Transform, ...]
    clipping: Clipping
    rounding: Rounding
    loss: Loss
    learning_rate: float
