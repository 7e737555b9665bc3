"""Norms and gates between the linears of a decoder layer, in plain torch.

    rms            n = x / sqrt(mean x^2 + eps)                 y = w round(n)
    rms_plus_one   the same n                                   y = n (1 + w)
    layer          n = (x - mean x) / sqrt(var x + eps)         y = n w + b
    silu           y = round(g / (1 + exp(-g))) u
    gelu_tanh      y = round(g / (1 + exp(-2 c (g + 0.044715 g^3)))) u,       c = sqrt(2 / pi)

`round` goes to the model's dtype, as y does at the end: what a model's own modules give. All else
is float32, in an order that any device can follow to the bit: a sum adds eight neighbours as a
binary tree in float32 and the eights in float64, where their order no longer shows; the exponential
is 2^n p(f), n the nearest integer, p a polynomial of degree 5 (relative error 1.6e-7).

Shape legend: M tokens, H hidden size, I features of a gate.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

__all__ = ["Gate", "Norm", "NormKind", "add_and_normalize", "apply_gate", "apply_norm"]

LOG2_E = 1.4426950408889634
GELU_SCALE = 0.7978845608028654
GELU_CUBE = 0.044715
ROUNDING = 12582912.0
EXPONENT_END = 100.0
EXP2_COEFFICIENTS = (
    0.0013390863314270973,
    0.009676031768321991,
    0.055503569543361664,
    0.2402210682630539,
    0.6931471824645996,
    1.0000001192092896,
)
NEIGHBOURS = 8


class NormKind(StrEnum):
    """What a norm does with its weight."""

    RMS = "rms"
    """Multiplies by it after rounding: Llama, Mistral, Qwen."""
    RMS_PLUS_ONE = "rms_plus_one"
    """Multiplies by one more than it, before rounding: Gemma."""
    LAYER = "layer"
    """Subtracts the mean, multiplies and adds a bias: OPT, Falcon."""


class Gate(StrEnum):
    """What the first half of a packed gate-up row does to the second."""

    SILU = "silu"
    """The sigmoid-weighted gate of Llama."""
    GELU_TANH = "gelu_tanh"
    """The tanh form of GELU, of Gemma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm over the features of a token."""

    kind: NormKind
    weight: torch.Tensor
    """float ``[H]``, contiguous."""
    eps: float
    bias: torch.Tensor | None = None
    """float ``[H]`` of a layer norm, contiguous."""

    def __post_init__(self) -> None:
        if (self.kind is NormKind.LAYER) != (self.bias is not None):
            raise ValueError(f"a {self.kind} norm with bias = {self.bias is not None}")


def add_and_normalize(
    x_MH: torch.Tensor, residual_MH: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block's output to the residual stream and normalize the sum.

    Args:
        x_MH: float ``[M, H]``.
        residual_MH: like `x_MH`.
        norm: of H features.

    Returns:
        The normed sum and the sum, both ``[M, H]`` in the dtype of `x_MH`.
    """
    total_MH = residual_MH + x_MH
    return apply_norm(total_MH, norm), total_MH


def apply_norm(x_MH: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Normalize float ``[M, H]``; the dtype stays."""
    dtype, weight_H = x_MH.dtype, norm.weight.float()
    x_MH = x_MH.float()
    match norm.kind:
        case NormKind.RMS:
            normed_MH = x_MH * _inverse_root(x_MH, norm.eps)
            return (weight_H * normed_MH.to(dtype).float()).to(dtype)
        case NormKind.RMS_PLUS_ONE:
            return (x_MH * _inverse_root(x_MH, norm.eps) * (weight_H + 1)).to(dtype)
        case NormKind.LAYER:
            assert norm.bias is not None, "a layer norm has a bias"
            centred_MH = x_MH - _mean(x_MH)
            normed_MH = centred_MH * _inverse_root(centred_MH, norm.eps)
            return (normed_MH * weight_H + norm.bias.float()).to(dtype)


def apply_gate(gate_up: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Gate float ``[M, 2 I]``, gates first, to ``[M, I]``; the dtype stays."""
    dtype = gate_up.dtype
    gates_MI, up_MI = gate_up.float().chunk(2, dim=-1)
    slope_MI = gates_MI
    if gate is Gate.GELU_TANH:
        cube_MI = gates_MI * gates_MI * gates_MI
        slope_MI = (gates_MI + cube_MI * GELU_CUBE) * (2 * GELU_SCALE)
    active_MI = gates_MI / (1 + _exp2(slope_MI * -LOG2_E))
    return (active_MI.to(dtype).float() * up_MI).to(dtype)


def _inverse_root(x_MH: torch.Tensor, eps: float) -> torch.Tensor:
    power_M1 = _mean(x_MH * x_MH)
    # torch's float32 root is not correctly rounded on every CPU; rounded from float64 it is
    root_M1 = (power_M1 + eps).double().sqrt().float()
    return torch.ones_like(root_M1) / root_M1


def _mean(x_MH: torch.Tensor) -> torch.Tensor:
    size = x_MH.shape[-1]
    sums = torch.nn.functional.pad(x_MH, (0, -size % NEIGHBOURS))
    for _ in range(NEIGHBOURS.bit_length() - 1):
        sums = sums[..., ::2] + sums[..., 1::2]
    return (sums.double().sum(-1, keepdim=True) * (1 / size)).float()


def _exp2(x: torch.Tensor) -> torch.Tensor:
    """2^x of float32, for finite results in every step between -100 and 100."""
    x = x.clamp(-EXPONENT_END, EXPONENT_END)
    shifted = x + ROUNDING
    fraction = x - (shifted - ROUNDING)
    value = torch.full_like(x, EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        value = value * fraction + coefficient
    # the shifted number ends in the bits of n; shifting drops its own exponent
    power = torch.bitwise_left_shift(shifted.view(torch.int32), 23)
    return (value.view(torch.int32) + power).view(torch.float32)
