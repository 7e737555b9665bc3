"""Prefill attention: chunks of the prompts of several sequences against packed keys and values.

The formula is that of `kernels.paged_attention`, zero-points folded in, scores of float16 operands
and weights of one rounding; a query sees the keys up to its own position. What earlier chunks left
in the pages is read from there, as is the present chunk: appended first, attended to then.

A program takes BLOCK_M rows of one sequence and one key-value head. A row is a query of a token and
a head, the heads of a token next to each other, so that all of them share what is unpacked. Codes
are unpacked in registers to a whole float16 tile (`kernels.kv_tiles`), whose columns are a
permutation of the dims; queries are read, and results written, in the same permutation.

The grid counts on the worst case and finds its sequence on the device: no number of tokens is read
by the host.

Shape legend: M queries in all, B sequences, Q query heads, H key-value heads, G = Q / H.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.attention import PagedContext, Scoring, attention_reference, check_attention
from kernels.kv_pages import RAW_BITS, KvPages, field_bits
from kernels.kv_tiles import (
    cap,
    dot,
    exp2,
    load_scale,
    load_words,
    load_zeros,
    log2,
    power_below,
    reciprocal,
    round_weights,
    tile_dims,
    unpack_tile,
    wait_for_predecessor,
)

__all__ = ["LaunchConfig", "paged_prefill", "select_config"]

LOG2_E = tl.constexpr(1.4426950408889634)
# as in `kernels.paged_attention`
HEADROOM = tl.constexpr(12.0)
LEAST_BLOCK_B = 64
"""Sequences that a program looks through; so one compilation serves up to 64."""
# below every score, and finite: a row may see nothing of a block
LOWEST = tl.constexpr(-1e30)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """The tile of a program."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    pdl: bool = False


def select_config(
    tokens: int, group: int, head_dim: int, table: dict[tuple[int, int], LaunchConfig] | None = None
) -> LaunchConfig:
    """Pick the launch; from compiled code, not measured.

    Args:
        tokens: M.
        group: G.
        head_dim: of a head.
        table: measured configs by group and head size, for 64 rows and more.
    """
    rows = tokens * group
    if table and rows >= 64 and (group, head_dim) in table:
        return table[group, head_dim]
    if rows < 64:
        return LaunchConfig(block_m=16, block_t=64, num_warps=4, num_stages=2)
    is_small, is_large_head = rows < 512, head_dim > 128
    return LaunchConfig(
        block_m=64 if is_small or is_large_head else 128,
        block_t=64,
        num_warps=4 if is_small and not is_large_head else 8,
        num_stages=2,
    )


def paged_prefill(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    cu_seqlens: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Attend with the last queries of every sequence.

    Args:
        query: float16 or bfloat16 ``[M, Q, D]``, dims adjacent.
        pages: of one layer, the present chunks appended.
        context: of B sequences; lengths count the present chunks.
        scoring: scale, window and cap.
        cu_seqlens: int32 ``[B + 1]``: where the queries of each sequence begin, and where they end.
        out: ``[M, Q, D]`` to write to, dims adjacent; rows behind the last sequence stay.
        config: None for `select_config`.

    Returns:
        ``[M, Q, D]`` of the dtype of the queries.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    check_attention(query, pages, context)
    if cu_seqlens.shape[0] != context.lengths.shape[0] + 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens must be int32 [{context.lengths.shape[0] + 1}],"
            f" got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if query.device.type == "cpu":
        result = attention_reference(query, pages, context, scoring, cu_seqlens).to(query.dtype)
        return result if out is None else out.copy_(result)
    return launch_paged_prefill(query, pages, context, scoring, cu_seqlens, out=out, config=config)


def launch_paged_prefill(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    cu_seqlens: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Run the Triton kernel, on a GPU or in the interpreter; see `paged_prefill`."""
    tokens, heads, head_dim = query.shape
    batch = context.lengths.shape[0]
    group = heads // pages.kv_heads
    config = config or select_config(tokens, group, head_dim)
    out = query.new_empty(query.shape) if out is None else out
    if not tokens or not batch:
        return out
    raw = pages.bits == RAW_BITS
    field = RAW_BITS if raw else field_bits(pages.bits)
    width = head_dim if raw else pages.codes.shape[-1] // 2
    # every sequence may end in a tile of its own
    tiles = -(-tokens * group // config.block_m) + batch
    _prefill_kernel[(tiles, pages.kv_heads)](
        query, query.stride(0), query.stride(1),
        pages.codes if raw else pages.codes.view(torch.int16),
        pages.scale, pages.zero_point if raw else pages.zero_point.flatten().view(torch.int32),
        context.block_table, context.block_table.stride(0),
        context.lengths, cu_seqlens,
        out, out.stride(0), out.stride(1),
        batch, scoring.softmax_scale, scoring.window or 0, scoring.soft_cap or 1.0,
        GROUP=group,
        KV_HEADS=pages.kv_heads,
        HEAD_DIM=head_dim,
        PAGE=pages.page_size,
        BITS=pages.bits,
        FIELD=field,
        WIDTH=width,
        HAS_WINDOW=scoring.window is not None,
        HAS_CAP=scoring.soft_cap is not None,
        BLOCK_B=max(LEAST_BLOCK_B, triton.next_power_of_2(batch)),
        BLOCK_M=config.block_m,
        BLOCK_T=config.block_t,
        BLOCK_W=triton.next_power_of_2(width),
        PDL=config.pdl,
        INTERP=query.device.type == "cpu",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip
    return out


# chunks behind decoding sequences begin at any of their rows, in any number
@triton.jit(
    do_not_specialize=["batch"], do_not_specialize_on_alignment=["table_ptr", "lengths_ptr"]
)
def _prefill_kernel(
    q_ptr, stride_qm, stride_qh,
    codes_ptr, scale_ptr, zero_ptr,
    table_ptr, stride_tb,
    lengths_ptr, starts_ptr,
    out_ptr, stride_om, stride_oh,
    batch, softmax_scale, window, soft_cap,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program attends BLOCK_M rows of a sequence, BLOCK_T tokens at a time."""
    BLOCK_D: tl.constexpr = BLOCK_W * (16 // FIELD)
    kv_head = tl.program_id(1)
    offs_w = tl.arange(0, BLOCK_W)
    offs_t = tl.arange(0, BLOCK_T)
    dims = tile_dims(tl.arange(0, BLOCK_D), FIELD, WIDTH)
    mask_d = dims < HEAD_DIM
    wait_for_predecessor(PDL)
    b, tile = _find_sequence(starts_ptr, tl.program_id(0), batch, GROUP, BLOCK_M, BLOCK_B)
    if b >= batch:
        return
    start = tl.load(starts_ptr + b)
    count = tl.load(starts_ptr + b + 1) - start
    length = tl.load(lengths_ptr + b)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < count * GROUP
    position = length - count + rows // GROUP
    seen_from = position - window if HAS_WINDOW else position * 0 - 1

    token = (start + rows // GROUP).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    mask_q = mask_m[:, None] & mask_d[None, :]
    q_ptrs = q_ptr + (token * stride_qm + head * stride_qh)[:, None] + dims[None, :]
    q, q_sum, unit = _scale_query(tl.load(q_ptrs, mask=mask_q, other=0.0), FIELD)
    q_scale = unit * softmax_scale * LOG2_E

    end = tl.minimum(length - count + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, length)
    begin = length - count + tile * BLOCK_M // GROUP + 1 - window if HAS_WINDOW else length * 0
    begin = tl.maximum(begin, 0) // BLOCK_T * BLOCK_T
    acc = tl.full((BLOCK_M, BLOCK_D), 0.0, dtype=tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.full((BLOCK_M,), 0.0, dtype=tl.float32)
    shift = tl.full((BLOCK_M,), 0.0, dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + offs_t
        inside = t < end
        # tokens beyond the end read page 0 and weigh nothing
        page = tl.load(table_ptr + b * stride_tb + t // PAGE, mask=inside, other=0).to(tl.int64)
        base = (page * KV_HEADS + kv_head) * PAGE
        row = 2 * base + t % PAGE
        k_zero, v_zero = load_zeros(zero_ptr, base + t % PAGE, t, inside, BITS)
        words = load_words(codes_ptr, row, inside, offs_w, WIDTH, FIELD)
        scale = load_scale(scale_ptr, row, inside, BITS)
        k = unpack_tile(words, FIELD, BITS, INTERP)
        x = tl.full((BLOCK_M, BLOCK_T), 0.0, dtype=tl.float32)
        x = dot(q, tl.trans(k), x, INTERP)
        x = (x - k_zero[None, :] * q_sum[:, None]) * scale[None, :]

        row += PAGE
        words = load_words(codes_ptr, row, inside, offs_w, WIDTH, FIELD)
        scale = load_scale(scale_ptr, row, inside, BITS)
        x = cap(x * q_scale[:, None], soft_cap, HAS_CAP, INTERP) + log2(scale, INTERP)[None, :]
        seen = (t[None, :] <= position[:, None]) & (t[None, :] > seen_from[:, None])
        x = tl.where(seen, x, float("-inf"))
        above = top
        top = tl.maximum(top, tl.max(x, axis=1) - HEADROOM)
        fade = exp2(above - top, INTERP)
        w_half = round_weights(exp2(x - top[:, None], INTERP), words, FIELD)
        w = w_half.to(tl.float32)
        shift = shift * fade + tl.sum(w * v_zero[None, :], axis=1)
        total = total * fade + tl.sum(w * reciprocal(scale, INTERP)[None, :], axis=1)
        acc = dot(w_half, unpack_tile(words, FIELD, BITS, INTERP), acc * fade[:, None], INTERP)

    o = (acc - shift[:, None]) * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out_ptrs = out_ptr + (token * stride_om + head * stride_oh)[:, None] + dims[None, :]
    tl.store(out_ptrs, o.to(out_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _find_sequence(
    starts_ptr, program, batch,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Give the sequence of a program and its tile therein; beyond the last sequence: none."""
    offs_b = tl.arange(0, BLOCK_B)
    begins = tl.load(starts_ptr + offs_b, mask=offs_b < batch, other=0)
    ends = tl.load(starts_ptr + offs_b + 1, mask=offs_b < batch, other=0)
    tiles = tl.cdiv((ends - begins) * GROUP, BLOCK_M)
    before = tl.cumsum(tiles, axis=0) <= program
    sequence = tl.sum(tl.where(before & (offs_b < batch), 1, 0), axis=0)
    return sequence, program - tl.sum(tl.where(before, tiles, 0), axis=0)


@triton.jit
def _scale_query(q, FIELD: tl.constexpr):
    """Scale rows by a power of two into float16, for the sake of packed codes."""
    unit = tl.full((q.shape[0],), 1.0, dtype=tl.float32)
    total = tl.full((q.shape[0],), 0.0, dtype=tl.float32)
    if FIELD < 16:
        wide = q.to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=1)
        unit, inverse = power_below(largest)
        q = (wide * inverse[:, None]).to(tl.float16)
        total = tl.sum(q.to(tl.float32), axis=1)
    return q, total, unit
