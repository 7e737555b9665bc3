"""Quantized tokens behind a gate, if any, and an online Hadamard transform, in one launch.

    y = H(p)^T X H(q) / sqrt(p q)         X[P, Q]: the channels of a block, row after row
    out = codes of round(y)               `round` to the dtype of x

Two small products on tensor cores. The first reads values of the model's dtype and entries +1 and
-1, so its products are exact; so are those of the second, which takes float32 in three parts. Sums
are float32 in the order of the tensor core: a code may be one off the reference where a value lies
at the border of two.

Programs that share a token (`kernels._token_kernel` says how they meet) own whole blocks. Where a
token is one block, they own columns of H(q) instead: each gates all of X and multiplies it by its
columns, which no other part has to see before the second product.

Shape legend: M tokens, K features, P and Q orders of the factors, B = K / (P Q) blocks.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels._token_kernel import (
    finite_range,
    gate,
    meet,
    open_slot,
    part_of_token,
    quantize_between,
    rounded,
    store_scale,
    store_sum,
)
from kernels._token_tile import store_group_sums, store_padding
from kernels.layer_math import Gate, apply_gate
from kernels.quantize_tokens import (
    FEW_TOKENS,
    SHARED_TOKENS,
    TokenForm,
    halves,
    new_tokens,
    quantize_tokens_reference,
)
from kernels.token_parts import (
    parts_that_fit,
    register_options,
    runs_to_meet,
    share_of,
    slots_of,
)
from kernels.tokens import TokenCodes

__all__ = [
    "LaunchConfig",
    "Transform",
    "can_rotate",
    "quantize_rotated",
    "quantize_rotated_reference",
    "select_config",
]

MIN_DOT = 16
FEWEST_TOKENS = 4
"""Up to which all parts that there may be are worth their place."""
MAX_PADDED = 1 << 15
"""Channels of a row that one program holds, factors padded to powers of two."""
ALONE = 4096
"""Channels up to which one program is as fast as several that meet."""
MOST_SHARES = 16


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
    parts: int = 1
    """Programs that share a token, a power of two up to 32."""


def select_config(
    features: int, transform: Transform, *, m: int = 1, shared: bool = False
) -> LaunchConfig:
    """Pick the launch for M rows; `shared` where parts may meet.

    Measured on an H100. Parts of a single block all gate the whole of it: 14336 channels of one
    token take 7.4 us in eight programs and 19.6 in one, of eight tokens 8.6 in four. They take 8
    warps, as 16 hold every channel twice for a product so narrow. Parts with blocks of their own
    take little longer than those of a gate without a transform. All take the hardware's
    exponential, so that a token has the same codes in every batch; behind a transform they are
    within one of the reference anyhow.
    """
    early = m <= FEW_TOKENS
    if not shared or m > SHARED_TOKENS or features <= ALONE:
        return LaunchConfig(launch_pdl=early, native_exp=True)
    blocks, _, q = _padded(features, transform)
    if blocks > 1:
        return LaunchConfig(launch_pdl=early, num_warps=4, parts=MOST_SHARES, native_exp=True)
    parts = min(MOST_SHARES, q // MIN_DOT) // (1 if m <= FEWEST_TOKENS else 2)
    return LaunchConfig(
        launch_pdl=early, num_warps=8, parts=max(1, parts), chunk=128, native_exp=True
    )


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
    slots: torch.Tensor | None = None,
) -> TokenCodes:
    """Gate, transform and quantize.

    Args:
        x: float16, bfloat16 or float32 ``[M, K]``, or ``[M, 2 K]`` in front of a gate, contiguous
            along features.
        transform: of blocks that divide K.
        form: what to write.
        step: a gate or None.
        out: written to and returned; None allocates.
        config: launch parameters; None takes one program a token.
        slots: from `kernels.token_parts.make_slots`, for every launch of one stream; without them
            one program takes a token, as where a part would own half a group.

    Raises:
        ValueError: if the block, the form or the parts do not fit K, or a row does not fit one
            program.
    """
    features = x.shape[1] if step is None else halves(x)
    p, q = len(transform.left), len(transform.right)
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
    parts = parts_that_fit(config.parts, len(x), slots)
    columns, group = tokens.codes.shape[1], features // form.groups
    own_blocks, own_columns = _share(features, transform, parts)
    if form.groups > 1 and (own_columns < q or own_blocks * transform.block % group):
        parts, own_blocks, own_columns = 1, features // transform.block, q
    _, block_p, block_q = _padded(features, transform)
    for _ in range(runs_to_meet(parts, interpreted=interpreted)):
        _rotated_kernel[(len(x), parts)](
            x, x.stride(0),
            transform.left, transform.right,
            tokens.codes, tokens.codes.stride(0),
            tokens.scale, tokens.zero_point, tokens.sums,
            x if slots is None else slots_of(slots, parts),
            1 / math.sqrt(transform.block),
            K=features,
            L=columns,
            P=p,
            Q=q,
            GROUPS=form.groups,
            BITS=form.bits,
            PROLOGUE="plain" if step is None else str(step),
            PARTS=parts,
            BLOCKS=own_blocks,
            COLUMNS=own_columns,
            BLOCK_B=triton.next_power_of_2(own_blocks),
            BLOCK_P=block_p,
            BLOCK_Q=block_q,
            BLOCK_C=max(MIN_DOT, triton.next_power_of_2(own_columns)),
            CHUNK=min(config.chunk, block_q),
            BLOCK_G=triton.next_power_of_2(max(1, own_blocks * transform.block // group)),
            BLOCK_PAD=triton.next_power_of_2(max(1, columns - features)),
            NATIVE_EXP=config.native_exp,
            PDL=config.launch_pdl and not interpreted,
            INTERP=interpreted,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **({"launch_pdl": True} if config.launch_pdl else {}),
            **({} if interpreted else register_options(parts, config.num_warps)),
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


def _share(features: int, transform: Transform, parts: int) -> tuple[int, int]:
    """Blocks of a part, and columns of the right factor."""
    blocks, q = features // transform.block, len(transform.right)
    if parts > 1 and blocks == 1:
        return 1, min(q, share_of(q, parts))
    return -(-blocks // parts), q


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
    slots_ptr,
    factor,
    K: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    NATIVE_EXP: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program transforms BLOCKS blocks, or COLUMNS columns of one, of a token.

    The tile is ``[BLOCK_B * BLOCK_P, BLOCK_C]``; more blocks than one are turned for the second
    product.
    """
    ROWS: tl.constexpr = BLOCK_B * BLOCK_P
    row = tl.program_id(0).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    part = part_of_token(PARTS)
    # one of both is 0
    first_block = part * (BLOCKS if COLUMNS == Q else 0)
    offs_c = part * (COLUMNS if COLUMNS < Q else 0) + tl.arange(0, BLOCK_C)
    offs_p = tl.arange(0, BLOCK_P)
    offs_r = tl.arange(0, ROWS)
    if PDL:
        gdc_launch_dependents()
    left_ptrs = left_ptr + offs_p[:, None] * P + offs_p[None, :]
    left = tl.load(left_ptrs, mask=(offs_p[:, None] < P) & (offs_p[None, :] < P), other=0.0)
    if PDL:
        gdc_wait()
    before, note = open_slot(slots_ptr, sums_ptr, row, part, BITS, GROUPS, PARTS)
    blocks = first_block + offs_r // BLOCK_P
    mask_r = (offs_r % BLOCK_P < P) & (offs_r // BLOCK_P < BLOCKS) & (blocks < K // (P * Q))
    mask_c = (tl.arange(0, BLOCK_C) < COLUMNS) & (offs_c < Q)
    starts = blocks * (P * Q) + (offs_r % BLOCK_P) * Q
    mixed = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for first in range(0, BLOCK_Q, CHUNK):
        offs_j = first + tl.arange(0, CHUNK)
        mask = mask_r[:, None] & (offs_j < Q)[None, :]
        x_ptrs = x_ptr + row * stride_xm + starts[:, None] + offs_j[None, :]
        x = _load_gated(x_ptrs, mask, K, PROLOGUE, NATIVE_EXP, dtype, INTERP)
        right_ptrs = right_ptr + offs_j[:, None] * Q + offs_c[None, :]
        right = tl.load(right_ptrs, mask=(offs_j < Q)[:, None] & mask_c[None, :], other=0.0)
        if INTERP:
            mixed = tl.dot(x.to(tl.float32), right, mixed)
        else:
            # entries of +1 and -1 are exact in every dtype
            mixed = tl.dot(x, right.to(dtype), mixed, input_precision="tf32x3")
    y = _mix_rows(left, mixed, BLOCK_B, BLOCK_P, BLOCK_C, PARTS, INTERP)
    y = rounded(y * factor, dtype, INTERP).to(tl.float32)
    mask = mask_r[:, None] & mask_c[None, :]
    y, low, high = finite_range(y, INTERP)
    low, high = meet(low, high, before, note, slots_ptr, row, part, PARTS, INTERP)
    scale, zero, codes = quantize_between(y, low, high, mask, BITS, not INTERP)
    codes_ptr += row * stride_cm
    tl.store(codes_ptr + starts[:, None] + offs_c[None, :], codes.to(tl.int8), mask=mask)
    store_scale(scale_ptr + row, zero_ptr + row, scale, zero, part)
    store_padding(codes_ptr, part, K, L, BLOCK_PAD)
    if GROUPS == 1:
        store_sum(sums_ptr + row, tl.sum(tl.sum(codes, 1), 0), note, part, PARTS)
    else:
        SIZE: tl.constexpr = K // GROUPS
        OWN: tl.constexpr = BLOCKS * P * Q // SIZE
        first_group = first_block * P * Q // SIZE
        store_group_sums(sums_ptr + row * GROUPS, codes_ptr, first_group, K, GROUPS, OWN, BLOCK_G)


@triton.jit
def _load_gated(
    x_ptrs, mask, K: tl.constexpr, PROLOGUE: tl.constexpr, NATIVE_EXP: tl.constexpr,
    dtype: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if PROLOGUE != "plain":
        up = tl.load(x_ptrs + K, mask=mask, other=0.0).to(tl.float32)
        active = gate(x.to(tl.float32), PROLOGUE, not INTERP, NATIVE_EXP)
        x = rounded(rounded(active, dtype, INTERP).to(tl.float32) * up, dtype, INTERP)
    return x


@triton.jit
def _mix_rows(
    left, mixed, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """The second product: few columns of one block are too few rows of a turned tile."""
    if PARTS > 1 and BLOCK_B == 1:
        return _signs_dot(tl.trans(left), mixed, INTERP)
    else:
        turned = tl.permute(tl.reshape(mixed, (BLOCK_B, BLOCK_P, BLOCK_C)), (0, 2, 1))
        turned = tl.reshape(turned, (BLOCK_B * BLOCK_C, BLOCK_P))
        turned = _dot_signs(turned, left, INTERP)
        turned = tl.reshape(turned, (BLOCK_B, BLOCK_C, BLOCK_P))
        return tl.reshape(tl.permute(turned, (0, 2, 1)), (BLOCK_B * BLOCK_P, BLOCK_C))


@triton.jit
def _dot_signs(x, signs, INTERP: tl.constexpr):
    """float32 times +1 and -1: the smallest thirds are added first."""
    if INTERP:
        return tl.dot(x, signs)
    else:
        low, middle, high = _thirds(x)
        total = tl.dot(middle, signs.to(tl.bfloat16), tl.dot(low, signs.to(tl.bfloat16)))
        return tl.dot(high, signs.to(tl.bfloat16), total)


@triton.jit
def _signs_dot(signs, x, INTERP: tl.constexpr):
    """+1 and -1 times float32, likewise."""
    if INTERP:
        return tl.dot(signs, x)
    else:
        low, middle, high = _thirds(x)
        total = tl.dot(signs.to(tl.bfloat16), middle, tl.dot(signs.to(tl.bfloat16), low))
        return tl.dot(signs.to(tl.bfloat16), high, total)


@triton.jit
def _thirds(x):
    """Three bfloat16 that hold all 24 bits."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return low, middle, high
