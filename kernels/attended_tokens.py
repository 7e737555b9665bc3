"""Decode attention whose outputs are quantized by the launch that combines its chunks.

    out = codes of round(x)     x as in `kernels.attention_chunks`, `round` to the dtype of queries

Codes are those of `kernels.activation_quant` in the form of `kernels.tokens`, with one scale for
all heads of a sequence; one without tokens gives zeros.

PARTS programs share a sequence, SHARE heads each, and meet for the range of all heads as
`kernels._token_kernel` says. Up to UNROLL chunks are asked for together, all of them where they are
few; they are added in their order, so neither number changes a bit.

Shape legend: B sequences, Q query heads, D dims of a head, S splits, K = Q D features, L columns.
"""

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from kernels import paged_attention as attention
from kernels import quantize_tokens as quantization
from kernels._token_kernel import (
    finite_range,
    meet,
    open_slot,
    part_of_token,
    quantize_between,
    rounded,
    store_scale,
    store_sum,
)
from kernels._token_tile import store_group_sums, store_padding
from kernels.attention import PagedContext, Scoring, attention_reference, check_attention
from kernels.attention_chunks import Chunks, chunking
from kernels.kv_pages import KvPages
from kernels.kv_tiles import wait_for_predecessor
from kernels.quantize_tokens import (
    TokenForm,
    new_tokens,
    quantize_tokens,
    quantize_tokens_reference,
)
from kernels.token_parts import (
    MOST_PARTS,
    parts_that_fit,
    register_options,
    runs_to_meet,
    slots_of,
)
from kernels.tokens import TokenCodes

__all__ = ["LaunchConfig", "attended_tokens", "attended_tokens_reference", "select_config"]


LOADED = 64
"""Values of chunks that a thread holds at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Launch parameters of the kernel that combines; every choice gives the same bits."""

    parts: int = 1
    """Programs that share a sequence, a power of two up to 32."""
    num_warps: int | None = None
    """None for four values a thread, as far as 8 warps go, or 16 of one program."""
    launch_pdl: bool = False
    """Start while the kernel before still runs (programmatic dependent launch)."""


def select_config(heads: int) -> LaunchConfig:
    """Pick the launch for Q heads: a program each, as far as the GPU holds all of them at once.

    Timed as it is, not against other numbers of programs.
    """
    return LaunchConfig(parts=min(MOST_PARTS, 1 << (heads.bit_length() - 1)))


def attended_tokens(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    form: TokenForm,
    *,
    attention_config: attention.LaunchConfig | None = None,
    config: LaunchConfig | None = None,
    slots: torch.Tensor | None = None,
) -> TokenCodes:
    """Attend with one query a sequence, and quantize each sequence's heads together: two launches.

    Args:
        query: float16 or bfloat16 ``[B, Q, D]``, dims adjacent.
        pages: of one layer, the present token appended.
        context: of B sequences.
        scoring: scale, window and cap.
        form: what to write, with K = Q D.
        attention_config: None for that of `paged_attention`.
        config: None for `select_config`.
        slots: from `kernels.token_parts.make_slots`, for every launch of one stream; without them
            one program combines a sequence.

    Raises:
        ValueError: if shapes, dtypes, the form or the parts do not fit.
    """
    check_attention(query, pages, context)
    if query.device.type == "cpu":
        return attended_tokens_reference(query, pages, context, scoring, form)
    return launch_attended_tokens(
        query, pages, context, scoring, form,
        attention_config=attention_config, config=config, slots=slots,
    )  # fmt: skip


def launch_attended_tokens(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    form: TokenForm,
    *,
    attention_config: attention.LaunchConfig | None = None,
    config: LaunchConfig | None = None,
    slots: torch.Tensor | None = None,
) -> TokenCodes:
    """Run the Triton kernels, on a GPU or in the interpreter; see `attended_tokens`."""
    batch, heads, head_dim = query.shape
    config = config or select_config(heads)
    longest = context.block_table.shape[1] * pages.page_size
    group = heads // pages.kv_heads
    chosen = attention_config or attention.select_config(pages, longest, group=group)
    if chosen.splits == 1:
        out = attention.launch_paged_attention(query, pages, context, scoring, config=chosen)
        return _quantize(out.view(batch, -1), form, launch_pdl=config.launch_pdl)
    tokens = new_tokens(query, heads * head_dim, form, None)
    if batch:
        chunks = attention.attend_chunks(query, pages, context, scoring, out=query, config=chosen)
        parts = parts_that_fit(config.parts, batch, slots)
        for _ in range(runs_to_meet(parts, interpreted=query.device.type == "cpu")):
            _combine(
                chunks, context, scoring, query, tokens, chosen,
                replace(config, parts=parts), slots,
            )  # fmt: skip
    return tokens


def _combine(
    chunks: Chunks, context: PagedContext, scoring: Scoring, query: torch.Tensor,
    tokens: TokenCodes, chosen: attention.LaunchConfig, config: LaunchConfig,
    slots: torch.Tensor | None,
) -> None:  # fmt: skip
    batch, heads, head_dim = query.shape
    columns, groups = tokens.codes.shape[1], tokens.sums.shape[1]
    share = _share(heads, head_dim, config.parts, groups)
    values = triton.next_power_of_2(share) * triton.next_power_of_2(head_dim)
    # parts have half of a multiprocessor's registers each, too few for 16 warps
    num_warps = config.num_warps or min(16 if config.parts == 1 else 8, max(1, values // 128))
    interpreted = query.device.type == "cpu"
    _combine_tokens_kernel[(batch, config.parts)](
        chunks.parts, chunks.sums, context.lengths,
        tokens.codes, tokens.codes.stride(0),
        tokens.scale, tokens.zero_point, tokens.sums,
        tokens.scale if slots is None else slots_of(slots, config.parts),
        query, scoring.window or 0,
        HEADS=heads,
        HEAD_DIM=head_dim,
        L=columns,
        GROUPS=groups,
        BITS=tokens.bits,
        HAS_WINDOW=scoring.window is not None,
        SPLITS=chosen.splits,
        MIN_CHUNK=chosen.min_chunk,
        PARTS=config.parts,
        SHARE=share,
        BLOCK_S=triton.next_power_of_2(chosen.splits),
        BLOCK_T=chosen.block_t,
        BLOCK_H=triton.next_power_of_2(share),
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_G=triton.next_power_of_2(max(1, share * head_dim * groups // (heads * head_dim))),
        BLOCK_PAD=triton.next_power_of_2(max(1, columns - heads * head_dim)),
        UNROLL=_chunks_at_once(chosen.splits, values // (32 * num_warps)),
        PDL=config.launch_pdl and not interpreted,
        INTERP=interpreted,
        num_warps=num_warps,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if config.launch_pdl else {}),
        **({} if interpreted else register_options(config.parts, num_warps)),
    )  # fmt: skip


def _share(heads: int, head_dim: int, parts: int, groups: int) -> int:
    """Heads of a part: whole groups of sums."""
    size = heads * head_dim // groups
    unit = 1 if groups == 1 else size // math.gcd(size, head_dim)
    return -(-heads // (parts * unit)) * unit


def _chunks_at_once(splits: int, values: int) -> int:
    """Chunks that a thread asks for together: all, or half of what fits, as two turns overlap."""
    if splits * values <= LOADED:
        return splits
    return max(1, LOADED // (2 * values))


def _quantize(x_MK: torch.Tensor, form: TokenForm, *, launch_pdl: bool) -> TokenCodes:
    columns = max(x_MK.shape[1], form.columns or 0)
    chosen = quantization.select_config(max(16, triton.next_power_of_2(columns)))
    return quantize_tokens(x_MK, form, config=replace(chosen, launch_pdl=launch_pdl))


def attended_tokens_reference(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    form: TokenForm,
) -> TokenCodes:
    """Compute `attended_tokens` in plain torch on any device, attention in float64."""
    out = attention_reference(query, pages, context, scoring).to(query.dtype)
    return quantize_tokens_reference(out.view(len(query), -1), form)


@triton.jit
def _combine_tokens_kernel(
    parts_ptr, sums_ptr, lengths_ptr,
    codes_ptr, stride_cm,
    scale_ptr, zero_ptr, code_sums_ptr,
    slots_ptr,
    like_ptr, window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program weighs the chunks of SHARE heads of a sequence: tile ``[BLOCK_H, BLOCK_D]``."""
    K: tl.constexpr = HEADS * HEAD_DIM
    b = tl.program_id(0).to(tl.int64)
    part = part_of_token(PARTS)
    own_h = tl.arange(0, BLOCK_H)
    offs_h = part * SHARE + own_h
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_h = (own_h < SHARE) & (offs_h < HEADS)
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    # lengths are older than the kernel before
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")
    _, begin, chunk = chunking(length, window, HAS_WINDOW, SPLITS, MIN_CHUNK, BLOCK_T)
    filled = tl.cdiv(length - begin, chunk)
    row = (b * HEADS + offs_h) * SPLITS
    part_ptrs = parts_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
    wait_for_predecessor(PDL)
    before, note = open_slot(slots_ptr, code_sums_ptr, b, part, BITS, GROUPS, PARTS)
    x = tl.load(
        sums_ptr + row[:, None] + offs_s[None, :],
        mask=mask_h[:, None] & (offs_s < filled)[None, :], other=float("-inf"),
    )  # fmt: skip
    loaded = _load_chunks(part_ptrs, sums_ptr + row, mask, mask_h, 0, filled, HEAD_DIM, UNROLL)
    top = tl.max(x, axis=1)
    # padded heads, and sequences without tokens
    top = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.full((BLOCK_H, BLOCK_D), 0.0, dtype=tl.float32)
    total = tl.full((BLOCK_H,), 0.0, dtype=tl.float32)
    if SPLITS <= UNROLL:
        acc, total = _weighed(acc, total, loaded, top, UNROLL)
    else:
        for start in range(0, filled, UNROLL):
            ahead = _load_chunks(
                part_ptrs, sums_ptr + row, mask, mask_h, start + UNROLL, filled, HEAD_DIM, UNROLL
            )
            acc, total = _weighed(acc, total, loaded, top, UNROLL)
            loaded = ahead
    o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    y = rounded(o, like_ptr.dtype.element_ty, INTERP).to(tl.float32)
    y, low, high = finite_range(y, INTERP)
    low, high = meet(low, high, before, note, slots_ptr, b, part, PARTS, INTERP)
    scale, zero, codes = quantize_between(y, low, high, mask, BITS, not INTERP)
    out = codes_ptr + b * stride_cm
    tl.store(out + offs_h[:, None] * HEAD_DIM + offs_d[None, :], codes.to(tl.int8), mask=mask)
    store_scale(scale_ptr + b, zero_ptr + b, scale, zero, part)
    store_padding(out, part, K, L, BLOCK_PAD)
    if GROUPS == 1:
        store_sum(code_sums_ptr + b, tl.sum(tl.sum(codes, 1), 0), note, part, PARTS)
    else:
        OWN: tl.constexpr = SHARE * HEAD_DIM // (K // GROUPS)
        store_group_sums(code_sums_ptr + b * GROUPS, out, part * OWN, K, GROUPS, OWN, BLOCK_G)


@triton.jit
def _load_chunks(
    part_ptrs, sum_ptrs, mask, mask_h, start, filled,
    HEAD_DIM: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Load logarithms and parts of UNROLL chunks; what is not filled weighs nothing."""
    loaded = ()
    for i in tl.static_range(UNROLL):
        s = start + i
        # a vector, as the interpreter makes no mask of a scalar
        live = mask_h & (mask_h.to(tl.int32) * 0 + s < filled)
        log = tl.load(sum_ptrs + s, mask=live, other=float("-inf"))
        part = tl.load(part_ptrs + s * HEAD_DIM, mask=mask & live[:, None], other=0.0)
        loaded = loaded + (log, part)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    return loaded


@triton.jit
def _weighed(acc, total, loaded, top, UNROLL: tl.constexpr):
    """Add chunks in their order, each by its weight."""
    for i in tl.static_range(UNROLL):
        w = tl.exp2(loaded[2 * i] - top)
        acc += loaded[2 * i + 1] * w[:, None]
        total += w
    return acc, total
