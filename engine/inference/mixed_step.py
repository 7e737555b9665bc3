"""Steps with chunks of prompts, scored ones too, or with drafts.

Chunks alone are replayed where there is a graph for them (`chunk_graphs`); everything else runs
launch by launch.

Shape legend: R rows of logits, V vocabulary, N sequences with drafts, K drafts at most.
"""

from dataclasses import dataclass

import torch

from engine.inference.chunk_graphs import ChunkGraphs
from engine.inference.draft_check import DraftRows, last_accepted, likeliest_tokens
from engine.inference.draw_kind import DrawKind
from engine.inference.mixed_batch import MixedBatch
from engine.inference.mixed_forward import MixedForward, add_parts
from engine.inference.ports import TokenSampler
from engine.inference.scored_rows import ScoredRows
from engine.inference.step_buffers import HostArena, StepBuffers
from kernels.step_state import record_tokens

__all__ = ["MixedLogits", "MixedStep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drafting:
    """Drafts on the device."""

    slots: torch.Tensor
    """int64 ``[N]``."""
    rows: torch.Tensor
    """int64 ``[N, K + 1]``."""
    drafts: torch.Tensor
    """int32 ``[N, K]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedLogits:
    """What a mixed step computed, and for whom."""

    logits: torch.Tensor
    """``[R, V]``: one row for each drawing sequence, then those of drafts, then scored ones; those
    of nobody follow where the batch was filled up."""
    slots: torch.Tensor
    """int64: of the drawing sequences."""
    drafting: _Drafting | None
    score_ids: torch.Tensor
    """int32: the token that each of the scored rows is asked about."""


class MixedStep:
    """Runs plans over the buffers of a runner."""

    def __init__(
        self,
        forward: MixedForward,
        chunks: ChunkGraphs,
        sampler: TokenSampler,
        buffers: StepBuffers,
        drawn: torch.Tensor,
        scored: ScoredRows,
    ) -> None:
        """Keep what all steps share; `drawn` is int32, for the tokens of a step."""
        self._forward, self._chunks, self._sampler = forward, chunks, sampler
        self._buffers, self._drawn, self._scored = buffers, drawn, scored

    def forward(self, batch: MixedBatch, arena: HostArena) -> MixedLogits:
        """Send what a batch needs in one copy, then compute its logits; the arena is empty."""
        filled = self._chunks.fill(batch)
        places = add_parts(filled or batch, arena)
        placed = self._buffers.pack(arena)
        drawing = arena.add([step.slot for step in batch.drawing])
        table = DraftRows.of([step.token_ids[-step.drafts :] for step in batch.drafting])
        drafting = [
            arena.add([step.slot for step in batch.drafting]),
            arena.add(table.rows.ravel()),
            arena.add(table.drafts.ravel()),
        ]
        score_ids = arena.add([each for step in batch.scoring for each in step.score_ids])
        sent = arena.send()
        self._buffers.apply(sent, placed)
        if filled is None:
            logits = self._forward.compute(sent, places, decodes=batch.decodes)
        else:
            logits = self._chunks.forward(sent, places)
        slots, rows, drafts = (sent[place] for place in drafting)
        return MixedLogits(
            logits=logits,
            slots=sent[drawing].long(),
            drafting=_Drafting(
                slots=slots.long(),
                rows=rows.long().view(table.rows.shape),
                drafts=drafts.view(table.drafts.shape),
            )
            if batch.drafting
            else None,
            score_ids=sent[score_ids],
        )

    def draw(self, computed: MixedLogits, kind: DrawKind) -> None:
        """Draw a token for every drawing sequence, verify drafts, and score."""
        state, count = self._buffers.state, len(computed.slots)
        scored = len(computed.score_ids)
        if count:
            logits = computed.logits[:count]
            tokens = self._sampler.draw(
                logits, computed.slots, full=kind.is_full, limited=kind.is_limited
            )
            record_tokens(state, computed.slots, tokens, self._drawn)
        if computed.drafting is not None:
            verified = len(computed.logits) - scored
            likeliest = likeliest_tokens(computed.logits[count:verified])
            self._drawn[count : count + len(likeliest)] = likeliest
            last = last_accepted(likeliest, computed.drafting.rows, computed.drafting.drafts)
            state.last_tokens[computed.drafting.slots] = last.clamp(min=0)
        if scored:
            self._scored.measure(computed.logits[-scored:], computed.score_ids)
