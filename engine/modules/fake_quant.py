"""The training twin of a quantized linear layer: float weights, seen through the grid."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn
from typing_extensions import override

from engine.modules.linear import QuantLinear, multiply_codes
from engine.modules.rotated import OnlineHadamard
from engine.numerics.affine import (
    AffineParams,
    GroupRange,
    affine_params,
    fake_quantize,
    fake_quantize_activations,
    quantize_weight,
    weight_range,
)
from engine.numerics.hadamard import rotate_columns
from engine.spec import FULL_BITS, WeightGrid

__all__ = ["FakeQuantLinear", "RangeClip", "keep_range"]

RangeClip = Callable[[GroupRange], GroupRange]
"""Narrows the range that a grid covers; a module with parameters where clipping is learned."""


def keep_range(group_range: GroupRange) -> GroupRange:
    """Cover the whole range: plain min-max rounding."""
    return group_range


class FakeQuantLinear(nn.Module):
    """A float linear layer that computes what its quantized form would.

    In training mode the forward is differentiable: weights and activations are quantized and
    dequantized with straight-through rounding. In evaluation mode it is exact: codes of both are
    multiplied as integers, and the result is bit-equal to `to_quant_linear`'s.

    Assign `clip` to narrow the range of every group; a module assigned there is registered, so
    that its parameters are found and saved under ``clip.``.

    With `input_hadamard`, the weight is taken in transformed columns and inputs are transformed.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    clip: RangeClip

    def __init__(
        self, linear: nn.Linear, grid: WeightGrid, a_bits: int, input_hadamard: int = 0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.grid = grid
        self.a_bits = a_bits
        self.input_hadamard = input_hadamard
        self.transform: nn.Module = nn.Identity()
        self.weight = linear.weight
        if input_hadamard:
            self.transform = OnlineHadamard(input_hadamard).to(linear.weight.device)
            turned = rotate_columns(linear.weight.detach(), input_hadamard)
            self.weight = nn.Parameter(turned, linear.weight.requires_grad)
        self.bias = linear.bias
        self.clip = keep_range

    @classmethod
    def clipped(cls, linear: nn.Linear, grid: WeightGrid, a_bits: int, clip: RangeClip) -> Self:
        """Make a twin whose ranges are clipped."""
        twin = cls(linear, grid, a_bits)
        twin.clip = clip
        return twin

    def group_range(self) -> GroupRange:
        """The range of every group after clipping; differentiable in what the clip learns."""
        return self.clip(weight_range(self.weight, self.grid.group_size))

    @torch.no_grad()
    def params(self) -> AffineParams:
        """The grid as it would be stored now."""
        return affine_params(self.group_range(), self.grid)

    @torch.no_grad()
    def codes(self) -> torch.Tensor:
        """The codes as they would be stored now: uint8 ``[N, K]``."""
        return quantize_weight(self.weight, self.params(), self.grid)

    @torch.no_grad()
    def to_quant_linear(self) -> QuantLinear:
        """Pack the layer as it is now."""
        bias = None if self.bias is None else self.bias.detach()
        return QuantLinear.from_codes(
            self.codes(), self.params(), self.grid, self.a_bits, bias, self.input_hadamard
        )

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to float ``[..., K]``; the result has the dtype of ``x``."""
        seen = self.transform(x)
        if not self.training:
            return multiply_codes(seen, self.codes(), self.params(), self.a_bits, self.bias)
        full = self.a_bits == FULL_BITS
        seen = seen.float() if full else fake_quantize_activations(seen, self.a_bits)
        w_NK = fake_quantize(self.weight, self.group_range(), self.grid)  # noqa: N806  shape suffix
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(seen, w_NK, bias).to(x.dtype)
