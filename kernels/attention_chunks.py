"""Contexts in chunks: how decode attention cuts a sequence, and how its parts come together again.

    x   = sum_s 2^(l_s - top) part_s / sum_s 2^(l_s - top)     l logarithms, top the largest of them

Chunks depend on the length of the sequence alone, and are combined in order: a result is the same
in every batch.

Shape legend: B sequences, Q query heads, D dims of a head, S splits.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl

from kernels.attention import PagedContext, Scoring
from kernels.kv_tiles import wait_for_predecessor

__all__ = ["ChunkConfig", "Chunks", "chunking", "combine_chunks"]


class ChunkConfig(Protocol):
    """What a launch of `kernels.paged_attention` says of its chunks."""

    @property
    def splits(self) -> int:
        """Chunks at most."""

    @property
    def min_chunk(self) -> int:
        """Tokens of a chunk at least."""

    @property
    def block_t(self) -> int:
        """Tokens of which a chunk is a multiple."""

    @property
    def combine_block_d(self) -> int:
        """Dims of one program that combines."""

    @property
    def pdl(self) -> bool:
        """Programmatic dependent launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """What the chunks of all sequences gave; undefined where a sequence has fewer."""

    parts: torch.Tensor
    """float32 ``[B, Q, S, D]``."""
    sums: torch.Tensor
    """float32 ``[B, Q, S]``: binary logarithms of their sums of weights."""


def combine_chunks(
    chunks: Chunks, config: ChunkConfig, context: PagedContext, scoring: Scoring, out: torch.Tensor
) -> None:
    """Weigh the chunks of every head into ``[B, Q, D]``: one launch."""
    batch, heads, head_dim = out.shape
    _combine_kernel[(triton.cdiv(head_dim, config.combine_block_d), heads, batch)](
        chunks.parts, chunks.sums, context.lengths,
        out, out.stride(0), out.stride(1),
        heads, scoring.window or 0,
        HEAD_DIM=head_dim,
        HAS_WINDOW=scoring.window is not None,
        SPLITS=config.splits,
        MIN_CHUNK=config.min_chunk,
        BLOCK_S=triton.next_power_of_2(config.splits),
        BLOCK_T=config.block_t,
        BLOCK_D=config.combine_block_d,
        PDL=config.pdl,
        num_warps=4,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip


@triton.jit
def chunking(
    length, window, HAS_WINDOW: tl.constexpr, SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Give the first token seen, where the first chunk begins and the tokens of a chunk."""
    first = tl.maximum(length - window, 0) if HAS_WINDOW else length * 0
    begin = first // BLOCK_T * BLOCK_T
    chunk = tl.maximum(tl.cdiv(length - begin, SPLITS), MIN_CHUNK)
    return first, begin, tl.cdiv(chunk, BLOCK_T) * BLOCK_T


@triton.jit
def _combine_kernel(
    parts_ptr, sums_ptr, lengths_ptr,
    out_ptr, stride_ob, stride_oh,
    heads, window,
    HEAD_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program weighs the chunks of BLOCK_D dims of one head: tile ``[BLOCK_S, BLOCK_D]``."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    # lengths are older than the kernel before
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")
    _, begin, chunk = chunking(length, window, HAS_WINDOW, SPLITS, MIN_CHUNK, BLOCK_T)
    filled = offs_s < tl.cdiv(length - begin, chunk)
    row = (b * heads + head) * SPLITS + offs_s
    wait_for_predecessor(PDL)
    x = tl.load(sums_ptr + row, mask=filled, other=float("-inf"))
    mask = filled[:, None] & (offs_d < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
    top = tl.max(x, axis=0)
    w = tl.exp2(x - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(w, axis=0)
    o = tl.sum(parts * w[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    out_ptrs = out_ptr + b * stride_ob + head * stride_oh + offs_d
    tl.store(out_ptrs, o.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
