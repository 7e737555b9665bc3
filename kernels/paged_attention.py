"""Decode attention: one query a sequence against packed keys and values.

    x[t] = scale s_k[t] (q . c_k[t] - z_k[t] sum q)                zero-points folded in
    w[t] = exp2(x[t] log2 e + log2 s_v[t] - m)                     kept up to 2^12 in float16
    out  = (sum_t w[t] c_v[t] - sum_t w[t] z_v[t]) / sum_t w[t] / s_v[t]

Codes and zero-points are counted from the middle code, and q is scaled by a power of two into the
range of float16, so all products are of exact operands; only w is rounded, and numerator and
denominator see the same rounded w. At 16 bits keys and values are read as they are, s = 1, z = 0.

A program takes one chunk of one sequence and up to BLOCK_G query heads of one key-value head, which
share its loads; words of packed codes go from shared memory into operand registers and are unpacked
there, one product for each field (`kernels.kv_tiles`). Chunks depend on the length of the sequence
alone: a result is the same in every batch. A second kernel combines the chunks in order.

Before the kernel ahead has ended, which as a rule appends keys and values, a program knows its
chunk and, if it is one of the first, has asked for it: lengths, tables and all tokens but the
newest are older than that kernel, which waited itself before it let this one start. What is asked
for goes to the L2 cache, where the newest token will be up to date, and is read after the wait.
Programs without a chunk leave at once, but for the first of a sequence: a launch in which nobody
waited could end before the kernel ahead, and what waits for it would take that kernel to have ended
too.

Shape legend: B sequences, Q query heads, H key-value heads, G = Q / H, D dims of a head, S splits.
"""

import torch
import triton
import triton.language as tl

from kernels.attention import PagedContext, Scoring, attention_reference, check_attention
from kernels.attention_chunks import Chunks, chunking, combine_chunks
from kernels.attention_config import LaunchConfig, select_config
from kernels.kv_pages import RAW_BITS, KvPages, field_bits
from kernels.kv_tiles import (
    ask_ahead,
    cap,
    dot,
    exp2,
    field_dims,
    load_pages,
    load_scale,
    load_words,
    load_zeros,
    log2,
    power_below,
    reciprocal,
    round_weights,
    unpack_field,
    wait_for_predecessor,
)

__all__ = ["LaunchConfig", "attend_chunks", "paged_attention", "select_config"]

LOG2_E = tl.constexpr(1.4426950408889634)
# float16 holds twice that many powers of two below 1 than above
HEADROOM = tl.constexpr(12.0)
MIN_DOT = 16


def paged_attention(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Attend with one query a sequence.

    Args:
        query: float16 or bfloat16 ``[B, Q, D]``, dims adjacent.
        pages: of one layer, the present token appended.
        context: of B sequences.
        scoring: scale, window and cap.
        out: ``[B, Q, D]`` to write to, dims adjacent.
        config: None for `select_config`.

    Returns:
        ``[B, Q, D]`` of the dtype of the queries; zeros for a sequence of length 0.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    check_attention(query, pages, context)
    if query.device.type == "cpu":
        result = attention_reference(query, pages, context, scoring).to(query.dtype)
        return result if out is None else out.copy_(result)
    return launch_paged_attention(query, pages, context, scoring, out=out, config=config)


def launch_paged_attention(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Run the Triton kernels, on a GPU or in the interpreter; see `paged_attention`."""
    longest = context.block_table.shape[1] * pages.page_size
    group = query.shape[1] // pages.kv_heads
    config = config or select_config(pages, longest, group=group)
    out = query.new_empty(query.shape) if out is None else out
    if not len(query):
        return out
    chunks = attend_chunks(query, pages, context, scoring, out=out, config=config)
    if config.splits > 1:
        combine_chunks(chunks, config, context, scoring, out)
    return out


def attend_chunks(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    *,
    out: torch.Tensor,
    config: LaunchConfig,
) -> Chunks:
    """Launch the kernel of the chunks alone; `out` is written where there is one chunk."""
    batch, heads, head_dim = query.shape
    table = context.block_table
    group = heads // pages.kv_heads
    block_g = max(MIN_DOT, min(64, triton.next_power_of_2(group)))
    head_blocks = triton.cdiv(group, block_g)
    parts, sums = out, out
    if config.splits > 1:
        parts = query.new_empty((batch, heads, config.splits, head_dim), dtype=torch.float32)
        sums = query.new_empty((batch, heads, config.splits), dtype=torch.float32)
    raw = pages.bits == RAW_BITS
    width = head_dim if raw else pages.codes.shape[-1] // 2
    _decode_kernel[(config.splits, pages.kv_heads * head_blocks, batch)](
        query, query.stride(0), query.stride(1),
        pages.codes if raw else pages.codes.view(torch.int16),
        pages.scale, pages.zero_point if raw else pages.zero_point.flatten().view(torch.int32),
        table, table.stride(0),
        context.lengths,
        out, out.stride(0), out.stride(1),
        parts, sums,
        scoring.softmax_scale, scoring.window or 0, scoring.soft_cap or 1.0,
        group, head_blocks,
        KV_HEADS=pages.kv_heads,
        HEAD_DIM=head_dim,
        PAGE=pages.page_size,
        BITS=pages.bits,
        FIELD=RAW_BITS if raw else field_bits(pages.bits),
        WIDTH=width,
        HAS_WINDOW=scoring.window is not None,
        HAS_CAP=scoring.soft_cap is not None,
        SPLITS=config.splits,
        MIN_CHUNK=config.min_chunk,
        BLOCK_G=block_g,
        BLOCK_T=config.block_t,
        BLOCK_W=max(MIN_DOT, triton.next_power_of_2(width)),
        AHEAD=config.ahead,
        PDL=config.pdl,
        INTERP=query.device.type == "cpu",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip
    return Chunks(parts=parts, sums=sums)


@triton.jit
def _decode_kernel(
    q_ptr, stride_qb, stride_qh,
    codes_ptr, scale_ptr, zero_ptr,
    table_ptr, stride_tb,
    lengths_ptr,
    out_ptr, stride_ob, stride_oh,
    parts_ptr, sums_ptr,
    softmax_scale, window, soft_cap,
    GROUP, head_blocks,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program attends BLOCK_G heads to one chunk, BLOCK_T tokens of packed words at a time."""
    FIELDS: tl.constexpr = 16 // FIELD
    split = tl.program_id(0)
    kv_head = tl.program_id(1) // head_blocks
    b = tl.program_id(2).to(tl.int64)
    offs_g = tl.program_id(1) % head_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_w = tl.arange(0, BLOCK_W)
    offs_t = tl.arange(0, BLOCK_T)
    mask_g = offs_g < GROUP
    mask_w = offs_w < WIDTH
    heads = kv_head * GROUP + offs_g
    # past the L1 cache, which only the wait brings up to date
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")
    first, begin, chunk = chunking(length, window, HAS_WINDOW, SPLITS, MIN_CHUNK, BLOCK_T)
    begin += split * chunk
    end = tl.minimum(begin + chunk, length)
    if SPLITS > 1:  # noqa: SIM102  a constant cannot be joined to a comparison on the device
        if (begin >= length) & (split > 0):
            return
    table_row = table_ptr + b * stride_tb
    page = load_pages(table_row, begin + offs_t, end, PAGE)
    if PDL:
        ask_ahead(
            codes_ptr, scale_ptr, zero_ptr, table_row, page, kv_head, begin + offs_t, end,
            KV_HEADS, PAGE, BITS, WIDTH, BLOCK_W, AHEAD,
        )  # fmt: skip
    wait_for_predecessor(PDL)

    q_rows = q_ptr + b * stride_qb + heads[:, None] * stride_qh
    mask_q = mask_g[:, None] & mask_w[None, :]
    q_fields, q_sum, unit = _load_query(q_rows, mask_q, offs_w, FIELD, WIDTH)
    q_scale = unit * softmax_scale * LOG2_E
    acc = (tl.full((BLOCK_G, BLOCK_W), 0.0, dtype=tl.float32),) * FIELDS
    top = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    total = tl.full((BLOCK_G,), 0.0, dtype=tl.float32)
    shift = tl.full((BLOCK_G,), 0.0, dtype=tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + offs_t
        inside = t < end
        base = (page * KV_HEADS + kv_head) * PAGE
        # a tile ahead: copies need not wait for it
        page = load_pages(table_row, t + BLOCK_T, end, PAGE)
        row = 2 * base + (t & (PAGE - 1))
        k_zero, v_zero = load_zeros(zero_ptr, base + (t & (PAGE - 1)), t, inside, BITS)
        words = load_words(codes_ptr, row, inside, offs_w, WIDTH, FIELD)
        scale = load_scale(scale_ptr, row, inside, BITS)
        x = tl.full((BLOCK_G, BLOCK_T), 0.0, dtype=tl.float32)
        for i in tl.static_range(FIELDS):
            k = unpack_field(words, i, FIELD, BITS, INTERP)
            x = dot(q_fields[i], tl.trans(k), x, INTERP)
        x = _corrected_scores(x, k_zero, q_sum, scale, FIELD)

        row += PAGE
        words = load_words(codes_ptr, row, inside, offs_w, WIDTH, FIELD)
        scale = load_scale(scale_ptr, row, inside, BITS)
        # infinity goes to tokens once, not to every head
        lift = _lift(scale, inside & (t >= first), FIELD, INTERP)
        x = cap(x * q_scale[:, None], soft_cap, HAS_CAP, INTERP) + lift[None, :]
        above = top
        top = tl.maximum(top, tl.max(x, axis=1) - HEADROOM)
        fade = exp2(above - top, INTERP)
        w_half = round_weights(exp2(x - top[:, None], INTERP), words, FIELD)
        w = w_half.to(tl.float32)
        total, shift = _sum_weights(total, shift, fade, w, v_zero, scale, FIELD, INTERP)
        faded = ()
        for i in tl.static_range(FIELDS):
            v = unpack_field(words, i, FIELD, BITS, INTERP)
            faded += (dot(w_half, v, acc[i] * fade[:, None], INTERP),)  # type: ignore[assignment]
        acc = faded

    # only a sequence without tokens has nothing to divide by
    divisor = tl.where(total == 0.0, 1.0, total)
    share = 1.0 / divisor
    if SPLITS > 1:
        offs_p = (b * KV_HEADS * GROUP + heads) * SPLITS + split
        tl.store(sums_ptr + offs_p, top + tl.log2(divisor), mask=mask_g)
        rows = parts_ptr + offs_p[:, None] * HEAD_DIM
    else:
        rows = out_ptr + b * stride_ob + heads[:, None] * stride_oh
    _store_fields(rows, acc, shift, share, mask_q, mask_g, FIELD, WIDTH)


@triton.jit
def _store_fields(
    rows, acc, shift, share, mask_q, mask_g, FIELD: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Store the dims of heads; those of the two bytes of a word are neighbours."""
    BLOCK_W: tl.constexpr = mask_q.shape[1]
    PER_BYTE: tl.constexpr = 1 if FIELD == 16 else 8 // FIELD
    for part in tl.static_range(PER_BYTE):
        o = (acc[part] - shift[:, None]) * share[:, None]
        if FIELD == 16:
            tl.store(
                rows + tl.arange(0, BLOCK_W)[None, :], o.to(rows.dtype.element_ty), mask=mask_q
            )
        else:
            upper = (acc[PER_BYTE + part] - shift[:, None]) * share[:, None]
            o = tl.join(o, upper).reshape(mask_q.shape[0], 2 * BLOCK_W)
            dims = tl.arange(0, 2 * BLOCK_W)[None, :]
            mask = mask_g[:, None] & (dims < 2 * WIDTH)
            row_dims = rows + (part * 2 * WIDTH + dims)
            tl.store(row_dims, o.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _corrected_scores(x, k_zero, q_sum, scale, FIELD: tl.constexpr):
    """Scores of codes with their zero-points and scales; keys as they are have neither."""
    if FIELD < 16:
        x = (x - k_zero[None, :] * q_sum[:, None]) * scale[None, :]
    return x


@triton.jit
def _lift(scale, seen, FIELD: tl.constexpr, INTERP: tl.constexpr):
    """What the scale of a value adds to its score: minus infinity where a token is not seen."""
    lift = scale * 0.0 if FIELD == 16 else log2(scale, INTERP)
    return tl.where(seen, lift, float("-inf"))


@triton.jit
def _sum_weights(
    total, shift, fade, w, v_zero, scale, FIELD: tl.constexpr, INTERP: tl.constexpr
):  # fmt: skip
    """Add the weights of a tile, and what zero-points take from its values."""
    if FIELD == 16:
        return total * fade + tl.sum(w, axis=1), shift
    else:
        totals = w * reciprocal(scale, INTERP)[None, :]
        shifts = w * v_zero[None, :]
        if INTERP:
            added, shifted = tl.sum(totals, axis=1), tl.sum(shifts, axis=1)
        else:
            # together, as threads of several warps meet for a sum
            added, shifted = tl.reduce((totals, shifts), 1, _added_pairs)
        return total * fade + added, shift * fade + shifted


@triton.jit
def _added_pairs(total_a, shift_a, total_b, shift_b):
    return total_a + total_b, shift_a + shift_b


@triton.jit
def _load_query(q_rows, mask, offs_w, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """Load queries as the fields lie; over packed codes in float16, scaled by a power of two."""
    FIELDS: tl.constexpr = 16 // FIELD
    unit = tl.full((mask.shape[0],), 1.0, dtype=tl.float32)
    inverse = unit
    q_sum = unit
    # whole tiles, so that only one of each is reduced
    total = tl.full(mask.shape, 0.0, dtype=tl.float32)
    if FIELD < 16:
        largest = total
        for i in tl.static_range(FIELDS):
            dims = field_dims(offs_w, i, FIELD, WIDTH)
            q = tl.load(q_rows + dims[None, :], mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(q))
        unit, inverse = power_below(tl.max(largest, axis=1))
    fields = ()
    for i in tl.static_range(FIELDS):
        dims = field_dims(offs_w, i, FIELD, WIDTH)
        q = tl.load(q_rows + dims[None, :], mask=mask, other=0.0)
        if FIELD < 16:
            q = (q.to(tl.float32) * inverse[:, None]).to(tl.float16)
            total += q.to(tl.float32)
        fields += (q,)  # type: ignore[assignment]
    if FIELD < 16:
        q_sum = tl.sum(total, axis=1)
    return fields, q_sum, unit
