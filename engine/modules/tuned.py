"""A linear layer whose scales learn, and its codes where asked: the last stage of a calibration.

    w = (code - zero_point) * scale * exp(gain)                   gain [N, S] starts at 0
    code = clamp(round(stored code + offset), 0, max_code)        offset [N, K], see below

Codes follow their scale: a weight keeps its code while the scale moves. Trained as a float weight
on a moving grid, one that lies on its level would give the scale no gradient at all, because what
the level gains the rounding takes back (LSQ's derivative is code - w / scale, here zero). Offsets
start at what rounding took off each weight, so those near the edge of two codes change first.

Shape legend: N outputs, K inputs, G inputs in a group, S = K / G groups.
"""

from collections.abc import Mapping

import torch
from torch import nn
from typing_extensions import override

from engine.modules.linear import QuantLinear
from engine.numerics.affine import round_through
from engine.spec import FULL_BITS
from kernels.activation_rounding import round_activations
from kernels.layouts import pack_codes

__all__ = ["TunedLinear"]


class TunedLinear(nn.Module):
    """Computes what a quantized layer would with what it has learned."""

    centred: torch.Tensor
    """int8 or int16 ``[N, K]``: twice the code's distance from zero."""
    scale: torch.Tensor
    """float32 ``[N, S]``: half the stored scale."""
    zero: torch.Tensor
    """float32 ``[N, S, 1]``: twice the place of zero among the codes."""

    def __init__(self, layer: QuantLinear, *, trains_codes: bool = False) -> None:
        super().__init__()
        doubled = 2 * layer.codes().to(torch.int16)
        group = layer.in_features // layer.weight_scale.shape[1]
        zero_NS = (2 * layer.params.centre).to(torch.int16)  # noqa: N806  shape suffix
        centred = doubled - zero_NS.repeat_interleave(group, dim=1)
        narrow = bool(centred.abs().amax() < 128)
        self.register_buffer("centred", centred.to(torch.int8) if narrow else centred)
        self.register_buffer("scale", layer.weight_scale.float() / 2)
        self.register_buffer("zero", zero_NS.float().unsqueeze(-1))
        self.gain = nn.Parameter(torch.zeros_like(self.scale))
        self.offset: nn.Parameter | None = None
        if trains_codes:
            start = torch.zeros_like(centred) if layer.remainder is None else layer.remainder
            self.offset = nn.Parameter(start.float())
        self.bias = layer.bias
        self.a_bits, self.grid = layer.a_bits, layer.grid
        self.transform: nn.Module = layer.transform or nn.Identity()

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to float ``[..., K]``; the result has the dtype of ``x``."""
        seen = self.transform(x.float())
        if self.a_bits != FULL_BITS:
            seen = round_activations(seen, self.a_bits)
        scale_NS1 = (self.scale * self.gain.exp()).unsqueeze(-1)  # noqa: N806  shape suffix
        weight = (self._grouped() * scale_NS1).view(self.centred.shape)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(seen, weight, bias).to(x.dtype)

    @torch.no_grad()
    def learned_scale(self) -> torch.Tensor:
        """The scale as it is stored: float16 ``[N, S]``."""
        return (2 * self.scale * self.gain.exp()).to(torch.float16)

    @torch.no_grad()
    def learned_parts(self) -> Mapping[str, torch.Tensor]:
        """What has changed of the tensors of a checkpoint, by their names there."""
        scale = {"weight_scale": self.learned_scale()}
        if self.offset is None:
            return scale
        codes_NSG = (self._grouped() + self.zero) / 2  # noqa: N806  shape suffix
        codes_NK = codes_NSG.to(torch.uint8).view(self.centred.shape)  # noqa: N806  as above
        return {"weight_packed": pack_codes(codes_NK, self.grid.planes), **scale}

    def _grouped(self) -> torch.Tensor:
        """Twice each code's distance from zero, as it is now: ``[N, S, G]``."""
        stored = self.centred.view(*self.scale.shape, -1)
        if self.offset is None:
            return stored
        code = (stored + self.zero) / 2 + round_through(self.offset.view(stored.shape))
        return 2 * code.clamp(0, self.grid.max_code) - self.zero
