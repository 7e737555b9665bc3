"""Integer products on int8 tensor cores, for two tokens up to prefill.

    S[m,n,g] = sum_{k in g} u_x[m,k] u_w[n,k]
    I[m,n,g] = c S - z_w[n,g] (R[m,g] - G z_x[m]) - c z_x[m] C[n,g]               int32
    Y[m,n]   = s_x[m] sum_g s_w[n,g] I[m,n,g] + bias[n]                           float32
    R[m,g]   = sum_{k in g} u_x[m,k]          C[n,g] = sum_{k in g} u_w[n,k]

c is the multiplier of the weight. I is exact and converted once; products are rounded before they
are summed, groups are summed in rising order.

Weights are the left operand: the bytes of a run go through shared memory into registers, one shift
and one mask on four codes at once turn them into int8, and every slice is one more product into the
same sums. Fields of one code are joined in registers, so odd widths cost no tensor work. Few tokens
split K over programs: each leaves its part in a slot of its own and the last to arrive adds the
slots in order, so the result does not depend on who is last.

Shape legend: M tokens, N outputs (NP with padding), K inputs (L with padding), S groups of G
inputs.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.field_codes import hold_run, join_fields
from kernels.shared_memory import room_of
from kernels.sliced import SlicedWeight
from kernels.split_sum import share_of_turns, sum_splits
from kernels.tile_config import LaunchConfig, TileShape, select_config
from kernels.tokens import TokenCodes

__all__ = ["SplitWorkspace", "tile_linear"]

MOST_OFFSET = (1 << 31) - 1
"""Of a token, in codes: the kernel counts in int32. More tokens take several launches."""
ALIGNED_ROWS = 16
"""So that every launch finds its scales at 16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitWorkspace:
    """Scratch of products that split K; serves any number of products, one at a time."""

    partials: torch.Tensor
    """int32 ``[splits * tiles * block_n * block_m]`` or more; read as float32 with groups."""
    arrivals: torch.Tensor
    """int32 ``[tiles]`` or more, all zero; every product leaves it so."""

    @classmethod
    def for_launch(cls, config: LaunchConfig, m: int, padded_n: int, device: torch.device) -> Self:
        """Allocate what one launch needs; with one split, nothing."""
        tiles = _tiles(config, m, padded_n) if config.splits > 1 else 0
        return cls(
            partials=torch.empty(
                config.splits * tiles * config.block_n * config.block_m,
                dtype=torch.int32,
                device=device,
            ),
            arrivals=torch.zeros(tiles, dtype=torch.int32, device=device),
        )


def tile_linear(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: LaunchConfig | None = None,
    workspace: SplitWorkspace | None = None,
) -> torch.Tensor:
    """Multiply quantized tokens by a sliced weight.

    Args:
        tokens: M tokens of L codes, rows contiguous.
        weight: N outputs of L codes in the layout of `kernels.sliced`.
        bias: float ``[N]`` or None.
        out_dtype: float16, bfloat16 or float32.
        config: how to launch; None selects by shape.
        workspace: for a config that splits K; None allocates and clears one, which is a launch
            more in a CUDA graph.

    Returns:
        ``[M, N]`` of that dtype.

    Raises:
        ValueError: if operands or config do not fit each other.
    """
    _check_operands(tokens, weight)
    m, n = tokens.codes.shape[0], weight.out_features
    out = tokens.codes.new_empty((m, n), dtype=out_dtype)
    if not m:
        return out
    most = MOST_OFFSET // max(1, tokens.codes.stride(0)) // ALIGNED_ROWS * ALIGNED_ROWS
    if m <= most:
        _launch(tokens, weight, bias, out, config, workspace)
        return out
    for first in range(0, m, most):
        part = slice(first, first + most)
        _launch(_tokens_of(tokens, part), weight, bias, out[part], config, workspace)
    return out


def _tokens_of(tokens: TokenCodes, part: slice) -> TokenCodes:
    return TokenCodes(
        codes=tokens.codes[part],
        scale=tokens.scale[part],
        zero_point=tokens.zero_point[part],
        sums=tokens.sums[part],
        bits=tokens.bits,
    )


def _launch(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: LaunchConfig | None,
    workspace: SplitWorkspace | None,
) -> None:
    m, n = out.shape
    padded_n, groups, slice_bytes = weight.padded_rows, weight.groups, weight.slice_bytes
    config = config or select_config(_shape_of(m, weight))
    config = config.fitted(
        weight.field_bits, slice_bytes, grouped=groups > 1, room=room_of(out.device)
    )
    workspace = workspace or SplitWorkspace.for_launch(config, m, padded_n, out.device)
    _check_workspace(workspace, config, _tiles(config, m, padded_n))
    codes: torch.Tensor | TensorDescriptor = tokens.codes
    if config.x_tma:
        codes = TensorDescriptor.from_tensor(tokens.codes, [config.block_m, config.block_k])
    fields = (*weight.fields, *[weight.fields[0]] * (3 - len(weight.fields)))
    field_bits = (*weight.field_bits, 0, 0)
    grid = (_tiles(config, m, padded_n), config.splits)
    _tile_kernel[grid](
        codes, tokens.codes.stride(0),
        tokens.scale, tokens.zero_point, tokens.sums,
        *fields,
        weight.scale, weight.zero_point, weight.sums,
        bias if bias is not None else weight.scale,
        out, out.stride(0),
        workspace.partials if groups == 1 else workspace.partials.view(torch.float32),
        workspace.arrivals,
        m, n, padded_n, weight.columns // (8 * slice_bytes), groups, weight.group_size,
        F0=field_bits[0],
        F1=field_bits[1],
        F2=field_bits[2],
        SLICE=slice_bytes,
        STORED_N=weight.block_rows,
        GROUP_SLICES=weight.group_size // slice_bytes if groups > 1 else 0,
        MULTIPLIER=weight.multiplier,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        GROUP_M=config.group_m,
        X_TMA=config.x_tma,
        PDL=config.pdl,
        INTERP=not isinstance(_tile_kernel, triton.JITFunction),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip


@triton.jit
def _tile_kernel(
    x_ptr, stride_xm,
    x_scale_ptr, x_zero_ptr, x_sums_ptr,
    w0_ptr, w1_ptr, w2_ptr,
    w_scale_ptr, w_zero_ptr, w_sums_ptr,
    bias_ptr,
    out_ptr, stride_om,
    partial_ptr, arrivals_ptr,
    M, N, NP, BLOCKS, GROUPS, GROUP_SIZE,
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
    GROUP_M: tl.constexpr,
    X_TMA: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program computes a tile ``[BLOCK_N, BLOCK_M]`` over its share of K, weights on the left.

    GROUP_SLICES is 0 with one scale a row.
    """
    NARROWEST: tl.constexpr = F2 if F2 else (F1 if F1 else F0)
    TURN: tl.constexpr = 8 // NARROWEST
    CUTS: tl.constexpr = SLICE // BLOCK_K
    RUN: tl.constexpr = STORED_N * SLICE
    GROUPED: tl.constexpr = GROUP_SLICES > 0
    tl.static_assert(CUTS == 1 or not GROUPED, "a group takes whole slices")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid_n, pid_m = _tile_of(tl.program_id(0), M, NP, BLOCK_M, BLOCK_N, GROUP_M)
    # rows beyond the edge repeat the last one and are not stored: loads need no masks
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.minimum(offs_n, NP - 1)
    rows_m = tl.minimum(offs_m, M - 1)
    offs_k = tl.arange(0, BLOCK_K)
    x_offs = rows_m[:, None] * stride_xm + offs_k[None, :]
    tile_n, row_n = rows_n // STORED_N, (rows_n % STORED_N) * SLICE
    w0_offs = (tile_n * (F0 * RUN) + row_n)[:, None] + offs_k[None, :]
    w1_offs = (tile_n * (F1 * RUN) + row_n)[:, None] + offs_k[None, :]
    w2_offs = (tile_n * (F2 * RUN) + row_n)[:, None] + offs_k[None, :]

    first, last = share_of_turns(tl.program_id(1), BLOCKS * NARROWEST, max(GROUP_SLICES, 1), SPLITS)
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)
    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for step in range(first * CUTS, last * CUTS):
        turn = step // CUTS
        cut = (step % CUTS) * BLOCK_K
        block = (turn // NARROWEST).to(tl.int64) * NP * SLICE
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
            if X_TMA:
                x = x_ptr.load([pid_m * BLOCK_M, k + s * SLICE])
            else:
                x = tl.load(x_ptr + (k + s * SLICE) + x_offs)
            codes = join_fields(w0, w1, w2, s, F0, F1, F2, INTERP)
            acc = tl.dot(codes, x.T, acc, out_dtype=tl.int32)
            total, acc = _close_group(
                total, acc, turn * TURN, s, GROUP_SIZE, GROUPS, TURN, GROUP_SLICES, MULTIPLIER,
                rows_m, rows_n, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
            )  # fmt: skip

    whole, mine = sum_splits(
        total if GROUPED else acc, partial_ptr, arrivals_ptr, BLOCK_N, BLOCK_M, SPLITS
    )
    if mine:
        y = whole
        if not GROUPED:
            y = _scaled(
                whole, 0, GROUP_SIZE, GROUPS, MULTIPLIER, rows_m, rows_n,
                x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
            )  # fmt: skip
        y = y * tl.load(x_scale_ptr + rows_m)[None, :]
        mask_n = offs_n < N
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + offs_n[:, None] + offs_m.to(tl.int64)[None, :] * stride_om
        mask = mask_n[:, None] & (offs_m < M)[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _close_group(
    total, acc, first, S: tl.constexpr, GROUP_SIZE, GROUPS,
    TURN: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    rows_m, rows_n, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
):  # fmt: skip
    """Move the sums of a group to the total where slice `first + S` is its last."""
    if GROUP_SLICES > 0:
        # a turn of whole groups closes each at a known place; else it is found at run time
        KNOWN: tl.constexpr = TURN % GROUP_SLICES == 0
        if (S + 1) % GROUP_SLICES == 0 if KNOWN else (first + S + 1) % GROUP_SLICES == 0:
            total += _scaled(
                acc, (first + S) // GROUP_SLICES, GROUP_SIZE, GROUPS, MULTIPLIER,
                rows_m, rows_n, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
            )  # fmt: skip
            acc = tl.full(acc.shape, 0, tl.int32)
    return total, acc


@triton.jit
def _scaled(
    acc, g, GROUP_SIZE, GROUPS, MULTIPLIER: tl.constexpr, rows_m, rows_n,
    x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
):  # fmt: skip
    """Correct the sums of a group in int32, convert once and scale by the weight's scale."""
    # slices of padding lie beyond the last group and add nothing
    inside = rows_n * 0 + g < GROUPS
    at_n = rows_n * GROUPS + g
    w_zero = tl.load(w_zero_ptr + at_n, mask=inside, other=0)
    w_sum = tl.load(w_sums_ptr + at_n, mask=inside, other=0)
    w_scale = tl.load(w_scale_ptr + at_n, mask=inside, other=0.0).to(tl.float32)
    x_sum = tl.load(x_sums_ptr + rows_m * GROUPS + g, mask=rows_m * 0 + g < GROUPS, other=0)
    x_zero = tl.load(x_zero_ptr + rows_m)
    # int32 may wrap on the way; the result fits
    whole = acc * MULTIPLIER - w_zero[:, None] * (x_sum - GROUP_SIZE * x_zero)[None, :]
    whole -= w_sum[:, None] * (MULTIPLIER * x_zero)[None, :]
    return whole.to(tl.float32) * w_scale[:, None]


@triton.jit
def _tile_of(pid, M, NP, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Walk GROUP_M tiles of tokens before the next tile of weights."""
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = (NP + BLOCK_N - 1) // BLOCK_N
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return within // height, first_m + within % height


def _shape_of(m: int, weight: SlicedWeight) -> TileShape:
    return TileShape(
        # an unpacked weight has fields of 8 bits
        bits=sum(weight.field_bits),
        m=m,
        n=weight.padded_rows,
        columns=weight.columns,
        slice_bytes=weight.slice_bytes,
        grouped=weight.groups > 1,
    )


def _tiles(config: LaunchConfig, m: int, padded_n: int) -> int:
    return -(-m // config.block_m) * -(-padded_n // config.block_n)


def _check_operands(tokens: TokenCodes, weight: SlicedWeight) -> None:
    columns = tokens.codes.shape[1]
    if columns != weight.columns:
        raise ValueError(f"tokens have {columns} columns, the weight {weight.columns}")
    if tokens.codes.device != weight.scale.device:
        raise ValueError(f"tokens are on {tokens.codes.device}, weights on {weight.scale.device}")
    if tokens.codes.stride(1) != 1 or tokens.codes.stride(0) % 16:
        raise ValueError(f"rows of tokens must be contiguous, strides are {tokens.codes.stride()}")
    if tokens.sums.shape[1] != weight.scale.shape[1]:
        raise ValueError(
            f"tokens have sums of {tokens.sums.shape[1]} groups, the weight {weight.scale.shape[1]}"
        )


def _check_workspace(workspace: SplitWorkspace, config: LaunchConfig, tiles: int) -> None:
    elements = config.splits * tiles * config.block_n * config.block_m
    if config.splits > 1 and (
        workspace.partials.numel() < elements or workspace.arrivals.numel() < tiles
    ):
        raise ValueError(
            f"{config.splits} splits of {tiles} tiles need {elements} partials, the workspace has"
            f" {workspace.partials.numel()} and {workspace.arrivals.numel()} arrivals"
        )
