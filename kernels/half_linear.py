"""Products of 16-bit activations and sliced weights: decode and small batches in one kernel.

    Y[m,n] = sum_g s_w[n,g] (c D[m,n,g] - (z_w[n,g] - c h) R[m,g]) + bias[n]             float32
    D[m,n,g] = sum_{k in g} x[m,k] (u_w[n,k] - h)          R[m,g] = sum_{k in g} x[m,k]

h is the middle code, 0 for signed bytes; u - h has at most 8 bits and is exact in both 16-bit
types, so no weight is rounded at all. c is the multiplier of the weight.

Each slice is two products, of its even and of its odd columns (`kernels.half_codes`). Activations
are put in that order first, and summed meanwhile.

More than 64 tokens dequantize the weight once and leave the product to cuBLAS.

Shape legend: M tokens, N outputs (NP with padding), K inputs (L with padding), S groups, G bytes of
a slice.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import triton
import triton.language as tl

from kernels.field_codes import hold_run
from kernels.half_codes import centred_codes
from kernels.shared_memory import LoopConfig, room_of
from kernels.sliced import SlicedWeight
from kernels.split_sum import share_of_turns, sum_splits
from kernels.unpack import unpack_half

__all__ = ["HalfConfig", "half_configs", "half_linear", "half_linear_reference"]

MOST_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfConfig(LoopConfig):
    """Tile and launch parameters of one kernel launch, of up to 64 tokens."""

    token_bytes: ClassVar[int] = 2


def half_configs(*, bits: int, m: int, n: int, columns: int) -> list[HalfConfig]:
    """Launches worth timing for a shape of at most 64 tokens, best guess first.

    Shared memory may have room for less of one, see `HalfConfig.fitted`.
    """
    block_m = max(8, triton.next_power_of_2(m))
    shapes = [(64, 4), (128, 4), (128, 8)]
    # below 64 outputs a warp multiplies alone, with fewer instructions a weight
    shapes = [(32, 2), (32, 4), *shapes] if m <= 8 else [*shapes, (32, 2)]
    found = []
    for block_n, warps in shapes:
        # about twelve warps on each of 132 multiprocessors
        fitting = 132 * 12 // warps // -(-n // block_n)
        splits = max(1, min(8, fitting, columns // 2048))
        found += [
            HalfConfig(
                block_m=block_m,
                block_n=block_n,
                block_k=128 if bits <= 4 else 64,
                num_warps=warps,
                num_stages=stages,
                splits=count,
            )
            for count in dict.fromkeys((splits, max(1, splits // 2), 2 * splits))
            for stages in (4, 3)
        ]
    return found


def half_linear(
    x: torch.Tensor,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    config: HalfConfig | None = None,
) -> torch.Tensor:
    """Multiply activations of 16 bits by a sliced weight.

    Args:
        x: float16 or bfloat16 ``[M, K]``, rows contiguous.
        weight: N outputs of K codes.
        bias: float ``[N]`` or None.
        config: how to launch at most 64 tokens; None takes the first of `half_configs`.

    Returns:
        ``[M, N]`` in the dtype of ``x``.

    Raises:
        ValueError: if K or the dtype does not fit.
    """
    _check(x, weight)
    m = x.shape[0]
    if m > MOST_TOKENS:
        w_NK = unpack_half(weight, x.dtype)
        return torch.nn.functional.linear(x, w_NK, None if bias is None else bias.to(x.dtype))
    out = x.new_empty((m, weight.out_features))
    if m:
        ordered, sums = order_columns(x, weight)
        config = config or _first(weight.bits, m, weight.padded_rows, weight.columns)
        _launch(ordered, sums, weight, bias, out, config)
    return out


@lru_cache(maxsize=1024)
def _first(bits: int, m: int, n: int, columns: int) -> HalfConfig:
    return half_configs(bits=bits, m=m, n=n, columns=columns)[0]


def order_columns(x: torch.Tensor, weight: SlicedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the even columns of every slice before the odd ones and sum the groups.

    Returns:
        ``[M, L]`` in the dtype of ``x`` and float32 ``[M, S]``.
    """
    m, k = x.shape
    ordered = x.new_empty((m, weight.columns))
    sums = x.new_empty((m, weight.groups), dtype=torch.float32)
    _order_kernel[(m, weight.groups)](
        x, x.stride(0),
        ordered, ordered.stride(0),
        sums,
        k, weight.columns, weight.groups, weight.group_size,
        HALF_SLICE=weight.slice_bytes // 2,
        BLOCK_K=1024,
        num_warps=4,
    )  # fmt: skip
    return ordered, sums


def half_linear_reference(
    x: torch.Tensor, codes_NK: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `half_linear` in float64 from the codes, 128 lower where they have 8 bits."""
    n, k = codes_NK.shape
    w = codes_NK.double().view(n, weight.groups, -1) * weight.multiplier
    w = (w - weight.zero_point[:n, :, None]) * weight.scale[:n, :, None].double()
    y = x.double() @ w.view(n, k).t()
    return y if bias is None else y + bias.double()


def _launch(
    ordered: torch.Tensor,
    sums: torch.Tensor,
    weight: SlicedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: HalfConfig,
) -> None:
    m, n = out.shape
    width, groups = weight.slice_bytes, weight.groups
    config = config.fitted(weight.field_bits, width, grouped=groups > 1, room=room_of(out.device))
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(weight.padded_rows, config.block_n)
    split_tiles = tiles if config.splits > 1 else 0
    size = config.splits * split_tiles * config.block_n * config.block_m
    field_bits = (*weight.field_bits, 0, 0)
    fields = [field.view(torch.int16) for field in weight.fields]
    _half_kernel[(tiles, config.splits)](
        ordered, ordered.stride(0), sums,
        *fields, *[fields[0]] * (3 - len(fields)),
        weight.scale, weight.zero_point,
        bias if bias is not None else weight.scale,
        out, out.stride(0),
        sums.new_empty(size), weight.sums.new_zeros(split_tiles),
        m, n, weight.padded_rows, weight.columns // (8 * width), groups,
        BITS=weight.bits,
        F0=field_bits[0],
        F1=field_bits[1],
        F2=field_bits[2],
        SLICE=width,
        STORED_N=weight.block_rows,
        GROUP_SLICES=weight.group_size // width if groups > 1 else 0,
        MULTIPLIER=weight.multiplier,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        INTERP=not isinstance(_half_kernel, triton.JITFunction),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _order_kernel(
    x_ptr, stride_xm,
    out_ptr, stride_om,
    sums_ptr,
    K, L, GROUPS, GROUP_SIZE,
    HALF_SLICE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program orders and sums one group of one token; the last group fills the padding."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = g * GROUP_SIZE
    last = L if g == GROUPS - 1 else first + GROUP_SIZE
    total = tl.full((BLOCK_K,), 0.0, tl.float32)
    for start in range(first, last, BLOCK_K):
        # column `to` of the output and the one it comes from
        to = start + tl.arange(0, BLOCK_K)
        within = to % (2 * HALF_SLICE)
        k = to - within + within % HALF_SLICE * 2 + within // HALF_SLICE
        inside = to < last
        x = tl.load(x_ptr + row * stride_xm + k, mask=inside & (k < K), other=0.0)
        tl.store(out_ptr + row * stride_om + to, x, mask=inside)
        total += x.to(tl.float32)
    tl.store(sums_ptr + row * GROUPS + g, tl.reduce(total, 0, _add))


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _half_kernel(
    x_ptr, stride_xm, x_sums_ptr,
    w0_ptr, w1_ptr, w2_ptr,
    w_scale_ptr, w_zero_ptr,
    bias_ptr,
    out_ptr, stride_om,
    partial_ptr, arrivals_ptr,
    M, N, NP, BLOCKS, GROUPS,
    BITS: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    SLICE: tl.constexpr,
    STORED_N: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program computes a tile ``[BLOCK_N, BLOCK_M]`` over its share of K, weights on the left.

    Lengths of weights are in lanes of 16 bits. GROUP_SLICES is 0 with one scale a row.
    """
    NARROWEST: tl.constexpr = F2 if F2 else (F1 if F1 else F0)
    TURN: tl.constexpr = 8 // NARROWEST
    CUTS: tl.constexpr = SLICE // BLOCK_K
    LANES: tl.constexpr = SLICE // 2
    RUN: tl.constexpr = STORED_N * LANES
    WIDTH: tl.constexpr = BLOCK_K // 2
    GROUPED: tl.constexpr = GROUP_SLICES > 0
    IS_HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    tl.static_assert(CUTS == 1 or not GROUPED, "a group takes whole slices")
    tiles_n = (NP + BLOCK_N - 1) // BLOCK_N
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows beyond the edge repeat the last one and are not stored: loads need no masks
    rows_n = tl.minimum(offs_n, NP - 1)
    rows_m = tl.minimum(offs_m, M - 1)
    offs_k = tl.arange(0, WIDTH)
    x_offs = rows_m[:, None] * stride_xm + offs_k[None, :]
    tile_n, row_n = rows_n // STORED_N, (rows_n % STORED_N) * LANES
    w0_offs = (tile_n * (F0 * RUN) + row_n)[:, None] + offs_k[None, :]
    w1_offs = (tile_n * (F1 * RUN) + row_n)[:, None] + offs_k[None, :]
    w2_offs = (tile_n * (F2 * RUN) + row_n)[:, None] + offs_k[None, :]

    first, last = share_of_turns(tl.program_id(1), BLOCKS * NARROWEST, max(GROUP_SLICES, 1), SPLITS)
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for step in range(first * CUTS, last * CUTS):
        turn = step // CUTS
        cut = (step % CUTS) * WIDTH
        block = (turn // NARROWEST).to(tl.int64) * NP * LANES
        part = turn % NARROWEST * TURN
        k = turn * (TURN * SLICE) + cut
        w0, w1, w2 = 0, 0, 0
        for s in tl.static_range(TURN):
            run0 = w0_ptr + (block * F0 + ((part + s) * F0 // 8 * RUN + cut))
            run1 = w1_ptr + (block * F1 + ((part + s) * F1 // 8 * RUN + cut))
            run2 = w2_ptr + (block * F2 + ((part + s) * F2 // 8 * RUN + cut))
            w0 = hold_run(w0, run0, w0_offs, s, F0)
            w1 = hold_run(w1, run1, w1_offs, s, F1)
            w2 = hold_run(w2, run2, w2_offs, s, F2)
            for odd in tl.static_range(2):
                x = tl.load(x_ptr + (k + s * SLICE + odd * LANES) + x_offs)
                w = centred_codes(w0, w1, w2, s, odd, BITS, F0, F1, F2, IS_HALF, INTERP)
                if INTERP:
                    # the interpreter multiplies bfloat16 wrongly
                    x = x.to(tl.float32)
                acc = tl.dot(w, x.T, acc)
            total, acc = _close_group(
                total, acc, turn * TURN, s, GROUPS, TURN, GROUP_SLICES, BITS, MULTIPLIER,
                rows_m, rows_n, x_sums_ptr, w_scale_ptr, w_zero_ptr,
            )  # fmt: skip

    whole, mine = sum_splits(
        total if GROUPED else acc, partial_ptr, arrivals_ptr, BLOCK_N, BLOCK_M, SPLITS
    )
    if mine:
        y = whole
        if not GROUPED:
            y = _scaled(
                whole, 0, GROUPS, BITS, MULTIPLIER, rows_m, rows_n,
                x_sums_ptr, w_scale_ptr, w_zero_ptr,
            )  # fmt: skip
        mask_n = offs_n < N
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + offs_n[:, None] + offs_m.to(tl.int64)[None, :] * stride_om
        mask = mask_n[:, None] & (offs_m < M)[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _close_group(
    total, acc, first, S: tl.constexpr, GROUPS,
    TURN: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    rows_m, rows_n, x_sums_ptr, w_scale_ptr, w_zero_ptr,
):  # fmt: skip
    """Move the sums of a group to the total where slice `first + S` is its last."""
    if GROUP_SLICES > 0:
        # a turn of whole groups closes each at a known place; else it is found at run time
        KNOWN: tl.constexpr = TURN % GROUP_SLICES == 0
        if (S + 1) % GROUP_SLICES == 0 if KNOWN else (first + S + 1) % GROUP_SLICES == 0:
            total += _scaled(
                acc, (first + S) // GROUP_SLICES, GROUPS, BITS, MULTIPLIER, rows_m, rows_n,
                x_sums_ptr, w_scale_ptr, w_zero_ptr,
            )  # fmt: skip
            acc = tl.full(acc.shape, 0.0, tl.float32)
    return total, acc


@triton.jit
def _scaled(
    acc, g, GROUPS, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, rows_m, rows_n,
    x_sums_ptr, w_scale_ptr, w_zero_ptr,
):  # fmt: skip
    """Correct the sums of a group for its zero-point and scale them."""
    MIDDLE: tl.constexpr = 0 if BITS == 8 else 1 << (BITS - 1)
    # slices of padding lie beyond the last group and add nothing
    inside = rows_n * 0 + g < GROUPS
    w_zero = tl.load(w_zero_ptr + rows_n * GROUPS + g, mask=inside, other=0)
    w_scale = tl.load(w_scale_ptr + rows_n * GROUPS + g, mask=inside, other=0.0).to(tl.float32)
    x_sum = tl.load(x_sums_ptr + rows_m * GROUPS + g, mask=rows_m * 0 + g < GROUPS, other=0.0)
    off = (w_zero - MULTIPLIER * MIDDLE).to(tl.float32)
    return (acc * MULTIPLIER - off[:, None] * x_sum[None, :]) * w_scale[:, None]


def _check(x: torch.Tensor, weight: SlicedWeight) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations must be float16 or bfloat16, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.stride(1) != 1:
        raise ValueError(
            f"activations {tuple(x.shape)} of strides {x.stride()} do not fit"
            f" K = {weight.in_features}"
        )
    if x.device != weight.scale.device:
        raise ValueError(f"activations are on {x.device}, weights on {weight.scale.device}")
