"""Per-token asymmetric quantization of activations.

    low        = min(min_k x, 0)            high = max(max_k x, 0)
    scale      = max((high - low) / (2^bits - 1), 1e-5)             fp32, per token
    zero_point = round(-low / scale)                                rounding half to even
    code       = clamp(round(x / scale) + zero_point, 0, 2^bits - 1)
    x          ~ (code - zero_point) * scale

A token that holds a value that is not finite gets the scale NaN, and its codes mean nothing: it
stays visible in every result and touches no other token.

Shape legend: M tokens, K features.
"""

from dataclasses import dataclass

import torch

__all__ = [
    "MIN_ACTIVATION_SCALE",
    "QuantizedActivations",
    "dequantize_activations",
    "quantize_activations",
]

MIN_ACTIVATION_SCALE = 1e-5
MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedActivations:
    """Quantized tokens: ``x ~ (codes - zero_point) * scale``."""

    codes: torch.Tensor
    """uint8 ``[M, K]``."""
    scale: torch.Tensor
    """float32 ``[M, 1]``."""
    zero_point: torch.Tensor
    """int32 ``[M, 1]``, itself a code."""
    bits: int
    """2..8; codes are below ``2 ** bits``."""


def quantize_activations(x_MK: torch.Tensor, bits: int) -> QuantizedActivations:
    """Quantize every token with its own scale and zero-point.

    Args:
        x_MK: float16, bfloat16 or float32 ``[M, K]``, any strides; the arithmetic is float32.
        bits: 2..8.

    Returns:
        Fresh contiguous tensors on the device of ``x_MK``.

    Raises:
        ValueError: if ``bits`` is out of range or the shape is not ``[M, K]``.
    """
    if not MIN_BITS <= bits <= MAX_BITS or x_MK.dim() != 2:
        raise ValueError(
            f"need 2-d tokens and {MIN_BITS} to {MAX_BITS} bits, got {x_MK.dim()}-d and {bits}"
        )
    max_code = (1 << bits) - 1
    x_MK = x_MK.detach().float()
    low_M1, high_M1 = torch.aminmax(x_MK, dim=1, keepdim=True)
    low_M1 = low_M1.clamp_(max=0)
    # CUDA multiplies by the reciprocal of a plain number; a tensor makes it divide, as a CPU does
    steps = x_MK.new_full((), max_code)
    scale_M1 = high_M1.clamp_(min=0).sub_(low_M1).div_(steps).clamp_(min=MIN_ACTIVATION_SCALE)
    # zero times infinity is NaN, everything else stays
    scale_M1 = torch.add(scale_M1, scale_M1, alpha=0)
    # -low is at most max_code scales, so rounding lands on a code
    zero_M1 = low_M1.div_(scale_M1).round_().neg_()
    codes_MK = x_MK.div(scale_M1).round_().add_(zero_M1).clamp_(0, max_code)
    return QuantizedActivations(
        codes=codes_MK.to(torch.uint8),
        scale=scale_M1,
        zero_point=zero_M1.to(torch.int32),
        bits=bits,
    )


def dequantize_activations(activations: QuantizedActivations) -> torch.Tensor:
    """Return the float32 ``[M, K]`` that the codes stand for."""
    centred_MK = activations.codes.to(torch.int32) - activations.zero_point
    return centred_MK.float() * activations.scale
