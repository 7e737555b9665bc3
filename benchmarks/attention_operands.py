"""Random pages of a case in copies that hold the same, and what a right output is.

Attention is rounded to the dtype of queries before it is quantized, so a value may fall on the
other side of the border of two codes; anything else is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.attention_case import PAGE_SIZE, AttentionCase
from benchmarks.timing import Method, copies_to_rotate
from kernels.attended_tokens import attended_tokens_reference
from kernels.attention import PagedContext, Scoring
from kernels.kv_pages import RAW_BITS, KvPages
from kernels.quantize_tokens import TokenForm
from kernels.tokens import TokenCodes

__all__ = ["FORM", "AttentionOperands", "draw_operands"]

FORM = TokenForm(bits=8)
DTYPE = torch.bfloat16
MOST_APART = 0.1
"""Codes that may be one off: a bfloat16 value moves by half a code where it rounds otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOperands:
    """What launches read."""

    query: torch.Tensor
    """bfloat16 ``[B, Q, D]``."""
    pages: KvPages
    contexts: Sequence[PagedContext]
    """One for each copy."""
    expected: TokenCodes = field(repr=False)

    def is_right(self, output: tuple[torch.Tensor, ...]) -> bool:
        """Whether codes, scale, zero-point and sums are those of attention in float64."""
        codes, scale, zero_point, sums = output
        apart = (codes.int() - self.expected.codes.int()).abs()
        # the zero-point moves all codes of a token with it
        moved = (zero_point.int() - self.expected.zero_point.int()).abs()
        return (
            bool(torch.isclose(scale, self.expected.scale, rtol=2e-2).all())
            and int(apart.max()) <= 1 + int(moved.max())
            and int(moved.max()) <= 1
            and float((apart > 0).float().mean()) < MOST_APART + float(moved.float().mean())
            and torch.equal(sums.sum(1, dtype=torch.int32), codes.sum(1, dtype=torch.int32))
        )


def draw_operands(case: AttentionCase, device: torch.device, method: Method) -> AttentionOperands:
    """Draw queries and pages; pages of a sequence lie anywhere in their copy."""
    counts = [-(-length // PAGE_SIZE) for length in case.lengths]
    own, copies = sum(counts), copies_to_rotate(case.moved_bytes, method)
    pages = KvPages.allocate(
        own * copies,
        case.kv_heads,
        case.head_dim,
        bits=case.bits,
        page_size=PAGE_SIZE,
        dtype=DTYPE,
        device=device,
    )
    _fill(pages, own)
    table = torch.zeros(case.batch, case.tokens // PAGE_SIZE, dtype=torch.int32, device=device)
    order = torch.randperm(own, dtype=torch.int32, device=device)
    first = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[first : first + count]
        first += count
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    contexts = [
        PagedContext(block_table=table + own * copy, lengths=lengths) for copy in range(copies)
    ]
    heads = case.kv_heads * case.group
    query = torch.randn(case.batch, heads, case.head_dim, device=device).to(DTYPE)
    scoring = Scoring(softmax_scale=case.head_dim**-0.5)
    expected = attended_tokens_reference(query, pages, contexts[0], scoring, FORM)
    return AttentionOperands(query=query, pages=pages, contexts=contexts, expected=expected)


def _fill(pages: KvPages, own: int) -> None:
    """Draw the first pages, and repeat them in every copy."""
    if pages.bits == RAW_BITS:
        pages.codes[:own].normal_()
    else:
        levels = 1 << pages.bits
        pages.codes[:own].random_(0, 256)
        pages.scale[:own].uniform_(2 / levels, 4 / levels)
        pages.zero_point[:own].random_(0, levels)
    for tensor in (pages.codes, pages.scale, pages.zero_point):
        for start in range(own, len(tensor), own):
            tensor[start : start + own] = tensor[:own]
