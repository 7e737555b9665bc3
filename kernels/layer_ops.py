"""Norms and gates without quantization, where a layer of 16-bit activations follows.

    normalize   norm(x), or norm(residual + x) with the sum
    gate        gate(x[:, :I]) * x[:, I:]

The kernel is that of `kernels.quantize_tokens`, which stores values instead of codes; references
are `apply_norm`, `add_and_normalize` and `apply_gate` of `kernels.layer_math`, bit for bit.

Shape legend: M tokens, K features, I features of a gate.
"""

from dataclasses import dataclass

import torch

from kernels.layer_math import Gate, Norm
from kernels.quantize_tokens import Launch, LaunchConfig, halves, launch_tokens

__all__ = ["NormedValues", "gate_values", "normalize_values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedValues:
    """What a norm gives, both ``[M, K]`` in the dtype of x."""

    values: torch.Tensor
    residual: torch.Tensor
    """The sum that was normalized; x itself where there was nothing to add."""


def normalize_values(
    x_MK: torch.Tensor,
    norm: Norm,
    *,
    residual: torch.Tensor | None = None,
    out: NormedValues | None = None,
    config: LaunchConfig | None = None,
) -> NormedValues:
    """Add to the residual stream and normalize.

    Args:
        x_MK: float16, bfloat16 or float32 ``[M, K]``, K <= 32768, features contiguous.
        norm: of K features.
        residual: like `x_MK`, or None where x is the stream itself.
        out: written to and returned; either may be an input. None allocates.
        config: None takes `kernels.quantize_tokens.select_config`.

    Raises:
        ValueError: if the norm or a layout does not fit K.
    """
    values = torch.empty_like(x_MK) if out is None else out.values
    total = x_MK if residual is None else torch.empty_like(x_MK) if out is None else out.residual
    launch = Launch(
        x=x_MK, features=x_MK.shape[1], step=norm, residual=residual, total=total, values=values
    )
    launch_tokens(launch, config)
    return NormedValues(values=values, residual=total)


def gate_values(
    gate_up: torch.Tensor,
    gate: Gate,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gate the input of a down projection.

    Args:
        gate_up: float16, bfloat16 or float32 ``[M, 2 I]``, gates first, I <= 32768, contiguous
            along features.
        gate: the gate.
        out: ``[M, I]``, written to and returned; None allocates.
        config: None takes `kernels.quantize_tokens.select_config`.
        slots: as of `kernels.quantize_tokens.quantize_gated`.

    Raises:
        ValueError: if a layout or the parts do not fit I.
    """
    features = halves(gate_up)
    values = gate_up.new_empty((len(gate_up), features)) if out is None else out
    launch = Launch(x=gate_up, features=features, step=gate, values=values, slots=slots)
    launch_tokens(launch, config)
    return values
