"""The training twin of a quantized linear layer: float weights, seen through the grid.

    w  = hadamard(weight * columns / rows) + a b^T        what methods made of the source's weight
    w^ = (clamp(round(w / scale + offset) + zero_point, 0, max_code) - zero_point) * scale
    y  = x^ w^^T + bias                                   x^ : activations on their own grid

Every part but the grid is optional; what is a module here and has parameters is trained.

Shape legend: N outputs, K inputs, S groups in a row.
"""

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import nn
from typing_extensions import override

from engine.modules.linear import QuantLinear
from engine.modules.operand import multiply_codes
from engine.modules.rotated import OnlineHadamard
from engine.numerics.affine import (
    AffineParams,
    GroupRange,
    affine_params,
    dequantize_weight,
    fake_quantize,
    quantize_weight,
    weight_range,
)
from engine.spec import FULL_BITS, WeightGrid
from kernels.activation_rounding import round_activations

__all__ = ["FakeQuantLinear", "RangeClip", "WeightChange", "keep_range"]

INSIDE = 0.49
"""Steps: a weight that is moved no further rounds to the code that it has."""
RangeClip = Callable[[GroupRange], GroupRange]
"""Narrows the range that a grid covers; a module with parameters where clipping is learned."""


class WeightChange(Protocol):
    """Rewrites weight and bias before they are rounded; a module where it is learned."""

    def __call__(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Change float32 ``[N, K]`` and ``[N]``, out of place."""

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What an input of the source's layer has become, float ``[..., K]``."""


def keep_range(group_range: GroupRange) -> GroupRange:
    """Cover the whole range: plain min-max rounding."""
    return group_range


class FakeQuantLinear(nn.Module):
    """A float linear layer that computes what its quantized form would.

    In training mode the forward is differentiable: weights and activations are quantized and
    dequantized with straight-through rounding. In evaluation mode it is exact: codes of both are
    multiplied as integers, and the result is bit-equal to `to_quant_linear`'s.

    Assign `clip` to narrow the range of every group, `changes` to rewrite the weight, `offset` to
    move each weight before it is rounded, `base_range` to cover another range than the weight's.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    clip: RangeClip
    offset: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, grid: WeightGrid, a_bits: int, input_hadamard: int = 0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.grid = grid
        self.a_bits = a_bits
        self.weight = linear.weight
        self.bias = linear.bias
        self.clip = keep_range
        self.changes = nn.ModuleList()
        self.input_hadamard = input_hadamard
        self.transform: nn.Module = nn.Identity()
        if input_hadamard:
            self.transform = OnlineHadamard(input_hadamard).to(linear.weight.device)
        self._is_turned = False
        self._folded: tuple[nn.Module, ...] = ()
        self.offset = None
        self.base_range: GroupRange | None = None

    @classmethod
    def clipped(cls, linear: nn.Linear, grid: WeightGrid, a_bits: int, clip: RangeClip) -> Self:
        """Make a twin whose ranges are clipped."""
        twin = cls(linear, grid, a_bits)
        twin.clip = clip
        return twin

    def changed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``[N, K]`` and bias ``[N]`` after every change; differentiable."""
        weight, bias = self.weight, self.bias
        for change in self.changes:
            weight, bias = change(weight, bias)
        if self.input_hadamard and not self._is_turned:
            # its factors are where the weight is: a captured step cannot wait for a copy
            weight = self.transform(weight)
        return weight, bias

    @torch.no_grad()
    def as_seen(self, x: torch.Tensor) -> torch.Tensor:
        """Bring inputs of the source's layer, ``[..., K]``, to where the weight now takes them."""
        for change in self._folded:
            x = change.seen(x)  # type: ignore[operator]  # a WeightChange
        seen: torch.Tensor = self.transform(x)
        return seen

    def fix_range(self, group_range: GroupRange) -> None:
        """Cover this range from now on, whatever the weight becomes."""
        # torch refuses a function where a module was
        self._modules.pop("clip", None)
        self.base_range, self.clip = group_range, keep_range

    @torch.no_grad()
    def fold(self) -> None:
        """Make what the changes come to the weight itself; none are left."""
        weight, bias = self.changed()
        self._is_turned = True
        self._folded = (*self._folded, *self.changes)
        self.changes = nn.ModuleList()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def group_range(self, w_NK: torch.Tensor | None = None) -> GroupRange:  # noqa: N803  shape suffix
        """The range of every group after clipping; differentiable in what the clip learns."""
        if self.base_range is not None:
            return self.clip(self.base_range)
        weight = self.changed()[0] if w_NK is None else w_NK
        return self.clip(weight_range(weight, self.grid.group_size))

    @torch.no_grad()
    def params(self) -> AffineParams:
        """The grid as it would be stored now."""
        return affine_params(self.group_range(), self.grid)

    @torch.no_grad()
    def codes(self) -> torch.Tensor:
        """The codes as they would be stored now: uint8 ``[N, K]``."""
        return self._codes(self.changed()[0], self.params())

    @torch.no_grad()
    def to_quant_linear(self, *, keeps_remainder: bool = False) -> QuantLinear:
        """Pack the layer as it is now, and keep what rounding took off where asked."""
        weight, bias = self.changed()
        params = affine_params(self.group_range(weight), self.grid)
        codes_NK = self._codes(weight, params)  # noqa: N806  shape suffix
        bias = None if bias is None else bias.detach()
        layer = QuantLinear.from_codes(
            codes_NK, params, self.grid, self.a_bits, bias, self.input_hadamard
        )
        if keeps_remainder:
            layer.remainder = self._steps_off(weight, codes_NK, params)
        return layer

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to float ``[..., K]``; the result has the dtype of ``x``."""
        weight, bias = self.changed()
        group_range = self.group_range(weight)
        seen = self.transform(x if self.a_bits == FULL_BITS else x.float())
        if not self.training:
            params = affine_params(group_range, self.grid)
            out = multiply_codes(seen, self._codes(weight, params), params, self.a_bits, bias)
            return out.to(x.dtype)
        full = self.a_bits == FULL_BITS
        seen = seen.float() if full else round_activations(seen, self.a_bits)
        w_NK = fake_quantize(weight, group_range, self.grid, self.offset)  # noqa: N806  shape suffix
        bias = None if bias is None else bias.float()
        return nn.functional.linear(seen, w_NK, bias).to(x.dtype)

    def _codes(self, weight: torch.Tensor, params: AffineParams) -> torch.Tensor:
        if self.offset is not None:
            group = weight.shape[1] // params.scale.shape[1]
            steps = params.scale.float().repeat_interleave(group, dim=1)
            weight = weight.float() + self.offset * steps
        return quantize_weight(weight, params, self.grid)

    def _steps_off(
        self,
        weight: torch.Tensor,
        codes_NK: torch.Tensor,  # noqa: N803  shape suffix
        params: AffineParams,
    ) -> torch.Tensor:
        """How far each weight is from its level, in steps: less than half a step, or clamped."""
        level_NK = dequantize_weight(codes_NK, params)  # noqa: N806  shape suffix
        group = weight.shape[1] // params.scale.shape[1]
        scale_NK = params.scale.float().repeat_interleave(group, dim=1)  # noqa: N806  as above
        off_NK = (weight.float() - level_NK) / scale_NK  # noqa: N806  as above
        if self.offset is not None:
            off_NK = off_NK + self.offset  # noqa: N806  as above
        return off_NK.clamp(-INSIDE, INSIDE).to(torch.float16)
