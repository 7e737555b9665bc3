"""A linear layer whose codes stay and whose scales learn: the last stage of a calibration.

    w = (code - zero_point) * scale * exp(gain)            gain [N, S] starts at 0

Shape legend: N outputs, K inputs, G inputs in a group, S = K / G groups.
"""

import torch
from torch import nn
from typing_extensions import override

from engine.modules.linear import QuantLinear
from engine.numerics.affine import fake_quantize_activations
from engine.spec import FULL_BITS

__all__ = ["TunedLinear"]


class TunedLinear(nn.Module):
    """Computes what a quantized layer would with its scales multiplied by learned gains."""

    centred: torch.Tensor
    """int8 or int16 ``[N, K]``: twice the code's distance from zero."""
    scale: torch.Tensor
    """float32 ``[N, S]``: half the stored scale."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        doubled = 2 * layer.codes().to(torch.int16)
        group = layer.in_features // layer.weight_scale.shape[1]
        zero_NK = (2 * layer.params.centre).to(torch.int16).repeat_interleave(group, dim=1)  # noqa: N806
        centred = doubled - zero_NK
        narrow = bool(centred.abs().amax() < 128)
        self.register_buffer("centred", centred.to(torch.int8) if narrow else centred)
        self.register_buffer("scale", layer.weight_scale.float() / 2)
        self.gain = nn.Parameter(torch.zeros_like(self.scale))
        self.bias = layer.bias
        self.a_bits = layer.a_bits
        self.transform: nn.Module = layer.transform or nn.Identity()

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to float ``[..., K]``; the result has the dtype of ``x``."""
        seen = self.transform(x.float())
        if self.a_bits != FULL_BITS:
            seen = fake_quantize_activations(seen, self.a_bits)
        scale_NS1 = (self.scale * self.gain.exp()).unsqueeze(-1)  # noqa: N806  shape suffix
        grouped = self.centred.view(*self.scale.shape, -1)
        weight = (grouped * scale_NS1).view(self.centred.shape)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(seen, weight, bias).to(x.dtype)

    @torch.no_grad()
    def learned_scale(self) -> torch.Tensor:
        """The scale as it is stored: float16 ``[N, S]``."""
        return (2 * self.scale * self.gain.exp()).to(torch.float16)
