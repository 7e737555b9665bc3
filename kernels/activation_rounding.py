"""Activations on their grid and back, in one launch each way: what training sees of rounded inputs.

    low  = min(min_k x, 0)     high = max(max_k x, 0)     s = max((high - low) / Q, 1e-5)
    z    = round(-low / s)     t = round(x / s) + z       out = (clamp(t, 0, Q) - z) s
    Q    = 2^bits - 1

The gradient passes through rounding as if it were not there, z is a constant, and the ends of the
range share theirs evenly among the values that reach them:

    inside     = 0 <= t <= Q
    d out / ds = (clamp(t, 0, Q) - z) - inside x / s
    dx         = inside grad + (is high / #high - is low / #low) sum_k(grad d out / ds) / Q

The same formulas in plain torch keep a dozen tensors of the size of x for the way back and read
them all again; here it is x alone. A row with a value that is not finite comes out as NaN.

Shape legend: M tokens, K features.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from typing_extensions import override

from kernels.activation_quant import MIN_ACTIVATION_SCALE

__all__ = ["RoundedActivations", "round_activations", "round_activations_reference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Tile and launch parameters of one kernel launch."""

    block_k: int
    num_warps: int


def select_config(k: int) -> LaunchConfig:
    """One program holds a whole row; about 32 values a thread, both tensors of the way back."""
    block_k = triton.next_power_of_2(k)
    return LaunchConfig(block_k=block_k, num_warps=min(16, max(1, block_k // 1024)))


def round_activations(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize and dequantize over the last dimension, straight-through, one scale a vector.

    Args:
        x: float ``[..., K]``.
        bits: 2..8.

    Returns:
        float32 ``[..., K]``.
    """
    if x.device.type == "cpu":
        return round_activations_reference(x, bits)
    rounded: torch.Tensor = RoundedActivations.apply(x.reshape(-1, x.shape[-1]), bits)  # type: ignore[no-untyped-call]  # torch has no types here
    return rounded.view(x.shape)


def round_activations_reference(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Compute `round_activations` in plain torch, on any device."""
    max_code = (1 << bits) - 1
    x = x.float()
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    # CUDA multiplies by the reciprocal of a plain number; a tensor makes it divide, as a CPU does
    steps = x.new_full((), max_code)
    scale = ((high - low) / steps).clamp(min=MIN_ACTIVATION_SCALE)
    zero_point = torch.round(-low / scale).clamp(0, max_code).detach()
    place = x / scale
    rounded = place + (torch.round(place) - place).detach()
    return ((rounded + zero_point).clamp(0, max_code) - zero_point) * scale


class RoundedActivations(torch.autograd.Function):
    """Quantize and dequantize rows, straight-through, on a GPU or in the interpreter."""

    @staticmethod
    @override
    def forward(ctx: Any, x_MK: torch.Tensor, bits: int) -> torch.Tensor:
        """Round float ``[M, K]`` to 2..8 bits: float32 ``[M, K]``."""
        x_MK = x_MK.contiguous()
        out_MK = x_MK.new_empty(x_MK.shape, dtype=torch.float32)
        config = select_config(x_MK.shape[1])
        _round_kernel[(len(x_MK),)](
            x_MK, out_MK, x_MK.shape[1],
            MAX_CODE=(1 << bits) - 1,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        ctx.save_for_backward(x_MK)
        ctx.bits = bits
        return out_MK

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_MK: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Give the gradient of the activations, in their dtype."""
        [x_MK] = ctx.saved_tensors
        dx_MK = torch.empty_like(x_MK)
        config = select_config(x_MK.shape[1])
        _gradient_kernel[(len(x_MK),)](
            x_MK, grad_MK.contiguous(), dx_MK, x_MK.shape[1],
            MAX_CODE=(1 << ctx.bits) - 1,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        return dx_MK, None


LEAST_SCALE = tl.constexpr(MIN_ACTIVATION_SCALE)
LARGEST = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32."""


@triton.jit
def _place(x, MAX_CODE: tl.constexpr):
    """Ends of the range, scale and zero-point of a row; padding of x is zero."""
    lowest = tl.min(x, axis=0)
    highest = tl.max(x, axis=0)
    span = tl.maximum(highest, 0.0) - tl.minimum(lowest, 0.0)
    scale = tl.maximum(tl.div_rn(span, MAX_CODE * 1.0), LEAST_SCALE)
    # written so that NaN is not finite either
    strange = tl.sum(tl.where(tl.abs(x) <= LARGEST, 0, 1), axis=0)
    scale = tl.where(strange > 0, float("nan"), scale)
    zero = _round_half_even(tl.div_rn(-tl.minimum(lowest, 0.0), scale))
    return lowest, highest, span, scale, zero


@triton.jit
def _round_half_even(x):
    """Round |x| < 2^22: beyond 1.5 * 2^23 a float32 has no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_kernel(x_ptr, out_ptr, K, MAX_CODE: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program rounds one row."""
    start = tl.program_id(0).to(tl.int64) * K
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    x = tl.load(x_ptr + start + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    _, _, _, scale, zero = _place(x, MAX_CODE)
    code = _round_half_even(tl.div_rn(x, tl.broadcast_to(scale, BLOCK_K))) + zero
    code = tl.minimum(tl.maximum(code, 0.0), MAX_CODE * 1.0)
    tl.store(out_ptr + start + offs_k, (code - zero) * scale, mask=mask_k)


@triton.jit
def _gradient_kernel(x_ptr, grad_ptr, dx_ptr, K, MAX_CODE: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program takes one row's gradient back."""
    start = tl.program_id(0).to(tl.int64) * K
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    x = tl.load(x_ptr + start + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + start + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    lowest, highest, span, scale, zero = _place(x, MAX_CODE)
    steps = tl.div_rn(x, tl.broadcast_to(scale, BLOCK_K))
    code = _round_half_even(steps) + zero
    inside = (code >= 0.0) & (code <= MAX_CODE * 1.0)
    centred = tl.minimum(tl.maximum(code, 0.0), MAX_CODE * 1.0) - zero
    of_scale = tl.sum(grad * (centred - tl.where(inside, steps, 0.0)), axis=0)
    # a scale at its least, and an end that zero sets, do not move with x
    of_end = tl.where(tl.div_rn(span, MAX_CODE * 1.0) >= LEAST_SCALE, of_scale, 0.0) / MAX_CODE
    is_high = mask_k & (tl.where(highest >= 0.0, x - highest, 1.0) == 0.0)
    is_low = mask_k & (tl.where(lowest <= 0.0, x - lowest, 1.0) == 0.0)
    highs = tl.maximum(tl.sum(is_high.to(tl.float32), axis=0), 1.0)
    lows = tl.maximum(tl.sum(is_low.to(tl.float32), axis=0), 1.0)
    dx = tl.where(inside, grad, 0.0)
    dx += tl.where(is_high, of_end / highs, 0.0) - tl.where(is_low, of_end / lows, 0.0)
    tl.store(dx_ptr + start + offs_k, dx.to(dx_ptr.dtype.element_ty), mask=mask_k)
