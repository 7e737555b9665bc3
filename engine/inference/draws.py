"""One draw of a batch: rules, tokens, counts and logprobs in order, by kernels or by plain torch.

Shape legend: R rows of logits, S slots, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.sampling import Filters, SamplingRows, sample_tokens, scratch_bytes
from kernels.sampling_reference import sample_tokens_reference
from kernels.scratch import Scratch
from kernels.token_logprobs import (
    RowLogprobs,
    logprob_scratch_bytes,
    measure_logprobs,
    measure_logprobs_reference,
)
from kernels.token_rules import (
    TokenRules,
    apply_rules,
    apply_rules_reference,
    count_tokens,
    count_tokens_reference,
)

__all__ = ["DrawMode", "DrawTables", "Draws", "KernelDraws", "TorchDraws"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawTables:
    """What every slot asks for."""

    sampling: SamplingRows
    rules: TokenRules
    is_measured: torch.Tensor
    """int32 ``[S]``: 1 where a slot asks for logprobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawMode:
    """What a draw looks at; no result depends on it unless a row needs what is left out."""

    full: bool
    """Rules and logprobs."""
    limited: bool
    """top_k, top_p and min_p."""
    advance: bool
    """Move positions and counts on."""


class Draws(Protocol):
    """Draws tokens of one batch after the other."""

    memory_bytes: int

    def draw(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        mode: DrawMode,
        tokens: torch.Tensor,
        logprobs: RowLogprobs,
    ) -> None:
        """Draw a token for every row.

        Args:
            logits: float ``[R, V]``, V contiguous; stays as it is.
            slots: int64 ``[R]``.
            mode: what to look at.
            tokens: int32 ``[R]``, written to.
            logprobs: of at least R rows; written to where a slot asks for it, in a full draw.
        """


class KernelDraws:
    """Launches Triton's kernels; allocates nothing after it was made."""

    def __init__(
        self, tables: DrawTables, *, rows: int, vocabulary: int, device: torch.device
    ) -> None:
        self._tables = tables
        # what rules make of the logits; the logits themselves are measured behind the draw
        self._changed = torch.zeros(rows, vocabulary, device=device)
        size = max(scratch_bytes(rows, vocabulary), logprob_scratch_bytes(rows, vocabulary))
        self._scratch = Scratch.of_bytes(size, device)
        self.memory_bytes = self._changed.nbytes + size

    def draw(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        mode: DrawMode,
        tokens: torch.Tensor,
        logprobs: RowLogprobs,
    ) -> None:
        """See `Draws.draw`."""
        tables, raw = self._tables, logits
        if mode.full:
            logits = apply_rules(raw, tables.rules, slots, out=self._changed[: len(slots)])
        sample_tokens(
            logits,
            tables.sampling,
            Filters(top_k=mode.limited, top_p=mode.limited, min_p=mode.limited),
            slots=slots,
            advance=mode.advance,
            out=tokens,
            scratch=self._scratch,
        )
        if mode.full and mode.advance:
            count_tokens(tokens, tables.rules, slots)
        if mode.full:
            measure_logprobs(
                raw, tokens, tables.is_measured, slots, logprobs, scratch=self._scratch
            )


class TorchDraws:
    """Computes the same in plain torch."""

    memory_bytes = 0

    def __init__(self, tables: DrawTables) -> None:
        self._tables = tables

    def draw(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        mode: DrawMode,
        tokens: torch.Tensor,
        logprobs: RowLogprobs,
    ) -> None:
        """See `Draws.draw`."""
        tables, raw = self._tables, logits
        if mode.full:
            logits = apply_rules_reference(raw, tables.rules, slots)
        tokens.copy_(
            sample_tokens_reference(logits, tables.sampling, slots=slots, advance=mode.advance)
        )
        if mode.full and mode.advance:
            count_tokens_reference(tokens, tables.rules, slots)
        if mode.full:
            measure_logprobs_reference(raw, tokens, tables.is_measured, slots, logprobs)
