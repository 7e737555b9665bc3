"""Decode attention whose outputs are quantized by the launch that combines its chunks.

    out = codes of round(x)     x as in `kernels.attention_chunks`, `round` to the dtype of queries

Codes are those of `kernels.activation_quant` in the form of `kernels.tokens`, with one scale for
all heads of a sequence; one without tokens gives zeros.

Shape legend: B sequences, Q query heads, D dims of a head, S splits, K = Q D features, L columns.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from kernels import paged_attention as attention
from kernels import quantize_tokens as quantization
from kernels._token_kernel import quantize_row, rounded
from kernels.attention import PagedContext, Scoring, attention_reference, check_attention
from kernels.attention_chunks import chunking
from kernels.kv_pages import KvPages
from kernels.kv_tiles import wait_for_predecessor
from kernels.quantize_tokens import (
    TokenForm,
    new_tokens,
    quantize_tokens,
    quantize_tokens_reference,
)
from kernels.tokens import TokenCodes

__all__ = ["LaunchConfig", "attended_tokens", "attended_tokens_reference", "select_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Launch parameters of the kernel that combines: not measured."""

    num_warps: int
    unroll: int = 4
    """Chunks whose loads are under way together."""
    launch_pdl: bool = False
    """Start while the kernel before still runs (programmatic dependent launch)."""


def select_config(features: int) -> LaunchConfig:
    """Pick the launch for rows of K features: 16 values a thread, 4 to 16 warps."""
    return LaunchConfig(num_warps=min(16, max(4, triton.next_power_of_2(features) // 512)))


def attended_tokens(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    form: TokenForm,
    *,
    attention_config: attention.LaunchConfig | None = None,
    config: LaunchConfig | None = None,
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

    Raises:
        ValueError: if shapes, dtypes or the form do not fit.
    """
    check_attention(query, pages, context)
    if query.device.type == "cpu":
        return attended_tokens_reference(query, pages, context, scoring, form)
    return launch_attended_tokens(
        query, pages, context, scoring, form, attention_config=attention_config, config=config
    )


def launch_attended_tokens(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    form: TokenForm,
    *,
    attention_config: attention.LaunchConfig | None = None,
    config: LaunchConfig | None = None,
) -> TokenCodes:
    """Run the Triton kernels, on a GPU or in the interpreter; see `attended_tokens`."""
    batch, heads, head_dim = query.shape
    config = config or select_config(heads * head_dim)
    longest = context.block_table.shape[1] * pages.page_size
    group = heads // pages.kv_heads
    chosen = attention_config or attention.select_config(pages, longest, group=group)
    if chosen.splits == 1:
        out = attention.launch_paged_attention(query, pages, context, scoring, config=chosen)
        return _quantize(out.view(batch, -1), form, launch_pdl=config.launch_pdl)
    tokens = new_tokens(query, heads * head_dim, form, None)
    if not batch:
        return tokens
    chunks = attention.attend_chunks(query, pages, context, scoring, out=query, config=chosen)
    columns = tokens.codes.shape[1]
    interpreted = query.device.type == "cpu"
    _combine_tokens_kernel[(batch,)](
        chunks.parts, chunks.sums, context.lengths,
        tokens.codes, tokens.codes.stride(0),
        tokens.scale, tokens.zero_point, tokens.sums,
        query, scoring.window or 0,
        HEADS=heads,
        HEAD_DIM=head_dim,
        L=columns,
        GROUPS=form.groups,
        BITS=form.bits,
        HAS_WINDOW=scoring.window is not None,
        SPLITS=chosen.splits,
        MIN_CHUNK=chosen.min_chunk,
        BLOCK_S=triton.next_power_of_2(chosen.splits),
        BLOCK_T=chosen.block_t,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK=triton.next_power_of_2(columns),
        UNROLL=config.unroll,
        PDL=config.launch_pdl and not interpreted,
        INTERP=interpreted,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if config.launch_pdl else {}),
    )  # fmt: skip
    return tokens


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
    like_ptr, window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program weighs the chunks of one sequence, all heads: tile ``[BLOCK_H, BLOCK_D]``."""
    K: tl.constexpr = HEADS * HEAD_DIM
    b = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_h = offs_h < HEADS
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    # lengths are older than the kernel before
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")
    _, begin, chunk = chunking(length, window, HAS_WINDOW, SPLITS, MIN_CHUNK, BLOCK_T)
    filled = tl.cdiv(length - begin, chunk)
    row = (b * HEADS + offs_h) * SPLITS
    part_ptrs = parts_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
    wait_for_predecessor(PDL)
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
    scale, zero, codes = quantize_row(y, mask, BITS, not INTERP, INTERP)
    out = codes_ptr + b * stride_cm
    tl.store(out + offs_h[:, None] * HEAD_DIM + offs_d[None, :], codes.to(tl.int8), mask=mask)
    tl.store(scale_ptr + b, scale)
    tl.store(zero_ptr + b, zero)
    cols = tl.arange(0, BLOCK)
    tl.store(out + cols, tl.zeros((BLOCK,), dtype=tl.int8), mask=(cols >= K) & (cols < L))
    if GROUPS == 1:
        tl.store(code_sums_ptr + b, tl.sum(tl.sum(codes, 1), 0))
    else:
        # groups are neighbours in memory, not in the tile: read back what this program wrote
        tl.debug_barrier()
        SIZE: tl.constexpr = K // GROUPS
        offs_g = tl.arange(0, BLOCK // SIZE)
        slots = offs_g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        written = tl.load(out + slots, mask=slots < K, other=0)
        group_sums = tl.sum(written.to(tl.int32), 1)
        tl.store(code_sums_ptr + b * GROUPS + offs_g, group_sums, mask=offs_g < GROUPS)


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
