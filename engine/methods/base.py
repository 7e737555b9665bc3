"""What a calibration method is made of: independent questions, one Protocol or switch each.

Transform: how is the block rewritten, without changing its function, before it is rounded?
Clipping: which part of a group's range does the grid cover?
Second order: what of a column's error do later columns take?
Rounding: which code does each weight get?
Loss: what is a wrong block output worth?
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.modules.fake_quant import RangeClip
from engine.recipe import EndToEnd, Rounding, SecondOrder
from engine.spec import WeightGrid

__all__ = ["BlockOutputs", "ChannelStatistics", "Clipping", "Loss", "Method"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatistics:
    """What flows into a linear, by input channel over all calibration tokens: float32 ``[K]``."""

    power: torch.Tensor
    """Mean square."""
    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOutputs:
    """What a loss compares, ``[B, T, H]`` each."""

    seen: torch.Tensor
    """Of the quantized block."""
    wanted: torch.Tensor
    """Of the full-precision block on the full-precision chain's inputs."""
    own: torch.Tensor | None = None
    """Of the full-precision block on the quantized chain's inputs; None where nobody asks."""
    token_weight: torch.Tensor | None = None
    """float32 ``[B, T, 1]``: what each token's error is multiplied by."""


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


class Loss(Protocol):
    """Compares block outputs."""

    needs_own: bool
    """Whether `BlockOutputs.own` must be there."""

    def __call__(self, outputs: BlockOutputs) -> torch.Tensor:
        """The scalar to minimize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One answer to each question, and how fast to learn."""

    equivalent_transform: bool
    clipping: Clipping
    factors: Clipping
    """Of ranges that are placed for good: what is still learned of them beside the rounding."""
    second_order: SecondOrder
    rounding: Rounding
    compensation: bool
    loss: Loss
    attention_loss: float
    end_to_end: EndToEnd
    end_to_end_epochs: int
    clipping_rate: float
    transform_rate: float
    rounding_rate: float
    tuning_rate: float
    chooses_clips: bool
    """Whether `clipping` covers anything but the whole range."""
    trains_clips: bool
    """Whether `clipping` has parameters."""
    trains_factors: bool
    """Whether `factors` have parameters."""

    @property
    def trains_ranges(self) -> bool:
        """Whether anything is trained before ranges are placed for good."""
        return self.equivalent_transform or self.compensation or self.trains_clips

    @property
    def trains_rounding(self) -> bool:
        """Whether anything is trained after ranges are placed for good."""
        return self.rounding is not Rounding.NEAREST or self.trains_factors

    @property
    def changes_anything(self) -> bool:
        """Whether the result can differ from rounding to nearest on the min-max grid."""
        return self.chooses_clips or self.trains_ranges or self.rounds_otherwise

    @property
    def rounds_otherwise(self) -> bool:
        """Whether codes are not simply the nearest."""
        return self.second_order is not SecondOrder.NONE or self.rounding is not Rounding.NEAREST
