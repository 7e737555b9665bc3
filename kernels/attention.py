"""What attention over paged keys and values computes, and its reference in float64.

    x[t]  = scale q . k[t]        c tanh(x / c) with a soft cap c
    p[t]  = exp(x[t]) / sum exp(x[t])         over max(0, pos - window + 1) <= t <= pos
    out   = sum p[t] v[t]

A sequence has `length` stored tokens, those of the present step included; its queries are the last
ones. Query head h reads key-value head h // (Q / H).

Shape legend: B sequences, M queries in all, Q query heads, H key-value heads, D dims of a head.
"""

from dataclasses import dataclass

import torch

from kernels.kv_pages import KvPages

__all__ = ["PagedContext", "Scoring", "attention_reference", "check_attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a query weighs a key."""

    softmax_scale: float
    window: int | None = None
    """Keys that a query sees, itself included; None for all."""
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedContext:
    """Where the tokens of B sequences lie."""

    block_table: torch.Tensor
    """int32 ``[B, max_pages]``: pages in order; what lies beyond a sequence is not read."""
    lengths: torch.Tensor
    """int32 ``[B]``: stored tokens; 0 gives zeros."""


def attention_reference(
    query: torch.Tensor,
    pages: KvPages,
    context: PagedContext,
    scoring: Scoring,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention in float64, sequence by sequence, from what the codes stand for.

    Args:
        query: float ``[M, Q, D]``.
        pages: of one layer.
        context: of B sequences.
        scoring: scale, window and cap.
        cu_seqlens: integers ``[B + 1]``, where the queries of each sequence begin; None for one
            query a sequence.

    Returns:
        float64 ``[M, Q, D]``.
    """
    lengths = context.lengths.tolist()
    starts = list(range(len(lengths) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for b, length in enumerate(lengths):
        if length and starts[b + 1] > starts[b]:
            t = torch.arange(length, device=query.device)
            page = context.block_table[b, t // pages.page_size].long()
            key, value = pages.stored(page * pages.page_size + t % pages.page_size).double()
            rows = slice(starts[b], starts[b + 1])
            out[rows] = _attend(query[rows].double(), key, value, scoring)
    return out


def _attend(
    query_MQD: torch.Tensor, key_HTD: torch.Tensor, value_HTD: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    group = query_MQD.shape[1] // key_HTD.shape[0]
    key, value = (x.repeat_interleave(group, dim=0) for x in (key_HTD, value_HTD))
    scores = torch.einsum("mqd,qtd->qmt", query_MQD, key) * scoring.softmax_scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    tokens, length = query_MQD.shape[0], key.shape[1]
    position = torch.arange(length - tokens, length, device=key.device).unsqueeze(1)
    behind = position - torch.arange(length, device=key.device)
    hidden = behind < 0
    if scoring.window is not None:
        hidden |= behind >= scoring.window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("qmt,qtd->mqd", weights, value)


def check_attention(query: torch.Tensor, pages: KvPages, context: PagedContext) -> None:
    """Refuse what the kernels cannot read.

    Raises:
        ValueError: naming what does not fit.
    """
    if query.shape[-1] != pages.head_dim or query.stride(-1) != 1:
        raise ValueError(f"queries must have {pages.head_dim} adjacent dims, got {query.shape[-1]}")
    if query.shape[1] % pages.kv_heads:
        raise ValueError(f"{pages.kv_heads} key-value heads do not divide {query.shape[1]} heads")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float16 or bfloat16, got {query.dtype}")
    if pages.bits == 16 and pages.codes.dtype != query.dtype:
        raise ValueError(f"pages are {pages.codes.dtype}, queries {query.dtype}")
    if context.block_table.dtype != torch.int32 or context.lengths.dtype != torch.int32:
        raise ValueError("block_table and lengths must be int32")
