"""Quantized tokens behind a gate, if any, and an online Hadamard transform, in one launch.

    y = H(p)^T X H(q) / sqrt(p q)         X[P, Q]: the channels of a block, row after row
    out = codes of round(y)               `round` to the dtype of x

Two small products on tensor cores. The first reads values of the model's dtype and entries +1 and
-1, so its products are exact; so are those of the second, which takes float32 in three parts. Sums
are float32 in the order of the tensor core: a code may be one off the reference where a value lies
at the border of two.

Shape legend: M tokens, K features, P and Q orders of the factors, B = K / (P Q) blocks.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels._token_kernel import gate, quantize_row, rounded
from kernels.layer_math import Gate, apply_gate
from kernels.quantize_tokens import TokenForm, halves, new_tokens, quantize_tokens_reference
from kernels.tokens import TokenCodes

__all__ = [
    "LaunchConfig",
    "Transform",
    "can_rotate",
    "quantize_rotated",
    "quantize_rotated_reference",
]

MIN_DOT = 16
MAX_PADDED = 1 << 15
"""Channels of a row that one program holds, factors padded to powers of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """The factors of a block, of +1 and -1."""

    left: torch.Tensor
    """float32 ``[P, P]``, contiguous."""
    right: torch.Tensor
    """float32 ``[Q, Q]``, contiguous."""

    @property
    def block(self) -> int:
        """Channels that are mixed."""
        return len(self.left) * len(self.right)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Launch parameters: not measured."""

    num_warps: int = 16
    chunk: int = 32
    """Rows of the right factor that are staged at a time: 16 to Q, a power of two."""
    native_exp: bool = False
    """Take the hardware's exponential for gates."""
    launch_pdl: bool = False
    """Start while the kernel before still runs (programmatic dependent launch)."""


def can_rotate(features: int, transform: Transform) -> bool:
    """Whether one program holds a row of so many features."""
    return not features % transform.block and math.prod(_padded(features, transform)) <= MAX_PADDED


def quantize_rotated(
    x: torch.Tensor,
    transform: Transform,
    form: TokenForm,
    *,
    step: Gate | None = None,
    out: TokenCodes | None = None,
    config: LaunchConfig | None = None,
) -> TokenCodes:
    """Gate, transform and quantize.

    Args:
        x: float16, bfloat16 or float32 ``[M, K]``, or ``[M, 2 K]`` in front of a gate, contiguous
            along features.
        transform: of blocks that divide K.
        form: what to write.
        step: a gate or None.
        out: written to and returned; None allocates.
        config: launch parameters.

    Raises:
        ValueError: if the block or the form does not fit K, or a row does not fit one program.
    """
    features = x.shape[1] if step is None else halves(x)
    p, q = len(transform.left), len(transform.right)
    padded = _padded(features, transform)
    if x.stride(1) != 1 or not can_rotate(features, transform):
        raise ValueError(
            f"blocks of {p} x {q} on {features} features, strides {x.stride()}: need whole blocks"
            " of at most 32768 channels with the factors padded to powers of two"
        )
    tokens = new_tokens(x, features, form, out)
    if not len(x):
        return tokens
    config = config or LaunchConfig()
    interpreted = not x.is_cuda
    _rotated_kernel[(len(x),)](
        x, x.stride(0),
        transform.left, transform.right,
        tokens.codes, tokens.codes.stride(0),
        tokens.scale, tokens.zero_point, tokens.sums,
        1 / math.sqrt(transform.block),
        K=features,
        L=tokens.codes.shape[1],
        P=p,
        Q=q,
        GROUPS=form.groups,
        BITS=form.bits,
        PROLOGUE="plain" if step is None else str(step),
        BLOCK_B=padded[0],
        BLOCK_P=padded[1],
        BLOCK_Q=padded[2],
        CHUNK=min(config.chunk, padded[2]),
        BLOCK=triton.next_power_of_2(max(features, tokens.codes.shape[1])),
        NATIVE_EXP=config.native_exp,
        PDL=config.launch_pdl and not interpreted,
        INTERP=interpreted,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if config.launch_pdl else {}),
    )  # fmt: skip
    return tokens


def quantize_rotated_reference(
    x: torch.Tensor, transform: Transform, form: TokenForm, *, step: Gate | None = None
) -> TokenCodes:
    """Compute `quantize_rotated` in plain torch on any device, products in float64."""
    x_MK = x if step is None else apply_gate(x, step)
    grid = x_MK.double().view(len(x_MK), -1, len(transform.left), len(transform.right))
    mixed = transform.left.double().T @ (grid @ transform.right.double())
    y_MK = mixed.reshape(x_MK.shape) / math.sqrt(transform.block)
    return quantize_tokens_reference(y_MK.to(x.dtype), form)


def _padded(features: int, transform: Transform) -> list[int]:
    """Blocks of a row and both factors, as the tiles of a program have them."""
    p, q = len(transform.left), len(transform.right)
    sizes = (features // transform.block, max(p, MIN_DOT), max(q, MIN_DOT))
    return [triton.next_power_of_2(n) for n in sizes]


@triton.jit
def _rotated_kernel(
    x_ptr, stride_xm,
    left_ptr, right_ptr,
    codes_ptr, stride_cm,
    scale_ptr, zero_ptr, sums_ptr,
    factor,
    K: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_EXP: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program transforms one token: ``[BLOCK_B * BLOCK_P, BLOCK_Q]``, then turned."""
    ROWS: tl.constexpr = BLOCK_B * BLOCK_P
    row = tl.program_id(0).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    offs_p = tl.arange(0, BLOCK_P)
    offs_q = tl.arange(0, BLOCK_Q)
    offs_r = tl.arange(0, ROWS)
    if PDL:
        gdc_launch_dependents()
    left_ptrs = left_ptr + offs_p[:, None] * P + offs_p[None, :]
    left = tl.load(left_ptrs, mask=(offs_p[:, None] < P) & (offs_p[None, :] < P), other=0.0)
    if PDL:
        gdc_wait()
    mask_r = (offs_r % BLOCK_P < P) & (offs_r // BLOCK_P < K // (P * Q))
    starts = (offs_r // BLOCK_P) * (P * Q) + (offs_r % BLOCK_P) * Q
    mixed = tl.zeros((ROWS, BLOCK_Q), dtype=tl.float32)
    for first in range(0, BLOCK_Q, CHUNK):
        offs_j = first + tl.arange(0, CHUNK)
        mask = mask_r[:, None] & (offs_j < Q)[None, :]
        x_ptrs = x_ptr + row * stride_xm + starts[:, None] + offs_j[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        if PROLOGUE != "plain":
            up = tl.load(x_ptrs + K, mask=mask, other=0.0).to(tl.float32)
            active = rounded(
                gate(x.to(tl.float32), PROLOGUE, not INTERP, NATIVE_EXP), dtype, INTERP
            )
            x = rounded(active.to(tl.float32) * up, dtype, INTERP)
        right_ptrs = right_ptr + offs_j[:, None] * Q + offs_q[None, :]
        mask_q = (offs_j < Q)[:, None] & (offs_q < Q)[None, :]
        right = tl.load(right_ptrs, mask=mask_q, other=0.0)
        if INTERP:
            mixed = tl.dot(x.to(tl.float32), right, mixed)
        else:
            # entries of +1 and -1 are exact in every dtype
            mixed = tl.dot(x, right.to(dtype), mixed, input_precision="tf32x3")
    turned = tl.permute(tl.reshape(mixed, (BLOCK_B, BLOCK_P, BLOCK_Q)), (0, 2, 1))
    turned = tl.reshape(turned, (BLOCK_B * BLOCK_Q, BLOCK_P))
    turned = _dot_signs(turned, left, INTERP)
    turned = tl.reshape(turned, (BLOCK_B, BLOCK_Q, BLOCK_P))
    y = tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, BLOCK_Q))
    y = rounded(y * factor, dtype, INTERP).to(tl.float32)
    mask = mask_r[:, None] & (offs_q < Q)[None, :]
    scale, zero, codes = quantize_row(y, mask, BITS, not INTERP, INTERP)
    out_ptrs = codes_ptr + row * stride_cm + starts[:, None] + offs_q[None, :]
    tl.store(out_ptrs, codes.to(tl.int8), mask=mask)
    tl.store(scale_ptr + row, scale)
    tl.store(zero_ptr + row, zero)
    cols = tl.arange(0, BLOCK)
    tl.store(codes_ptr + row * stride_cm + cols, tl.zeros((BLOCK,), dtype=tl.int8),
             mask=(cols >= K) & (cols < L))  # fmt: skip
    if GROUPS == 1:
        tl.store(sums_ptr + row, tl.sum(tl.sum(codes, 1), 0))
    else:
        # groups are neighbours in memory, not in the tile: read back what this program wrote
        tl.debug_barrier()
        SIZE: tl.constexpr = K // GROUPS
        offs_g = tl.arange(0, BLOCK // SIZE)
        slots = offs_g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        own = tl.load(codes_ptr + row * stride_cm + slots, mask=slots < K, other=0)
        group_sums = tl.sum(own.to(tl.int32), 1)
        tl.store(sums_ptr + row * GROUPS + offs_g, group_sums, mask=offs_g < GROUPS)


@triton.jit
def _dot_signs(x, signs, INTERP: tl.constexpr):
    """float32 times +1 and -1: three bfloat16 hold all 24 bits, the smallest are added first."""
    if INTERP:
        return tl.dot(x, signs)
    else:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        signs = signs.to(tl.bfloat16)
        total = tl.dot(low, signs)
        total = tl.dot(middle, signs, total)
        return tl.dot(high, signs, total)
