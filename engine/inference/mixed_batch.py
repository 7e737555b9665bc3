"""A step with chunks of prompts, laid out token by token on the host; no tensors.

Guesses to verify are laid out as so many decodes of one sequence, each with the tokens before it:
attention then adds them up as a step without guesses would, and no guess changes what follows.

Shape legend: M tokens, B sequences (a sequence with guesses once for each of its tokens), C of them
chunks, R rows of logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.inference.steps import SequenceStep, StepPlan

__all__ = ["ON_DEVICE", "MixedBatch"]

ON_DEVICE = -1
"""In place of a token that only the device knows."""
NOWHERE = -1
"""The cache slot of a token whose key and value are not kept."""
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedBatch:
    """What a decoder computes of a plan, and of which tokens it gives logits."""

    token_ids: Ints
    """``[M]``, `ON_DEVICE` for the token drawn last."""
    positions: Ints
    """``[M]``."""
    kv_slots: Ints
    """``[M]``."""
    slots: Ints
    """``[B]``."""
    lengths: Ints
    """``[B]``, the tokens of this step included."""
    decodes: int
    """Sequences of one token, which come first; tokens of sequences with drafts are the last."""
    cu_seqlens: Ints
    """``[C + 1]``: where chunks begin and end, from behind the decodes."""
    logit_rows: Ints
    """``[R]``: those of the drawing sequences, then those of drafts, then the scored ones; never
    empty, for a decoder need not know that nothing is drawn."""
    drawing: tuple[SequenceStep, ...]
    """Sequences that draw one token, in the order of the first logit rows."""
    drafting: tuple[SequenceStep, ...]
    """Sequences whose drafts are verified, one row more than drafts each."""
    scoring: tuple[SequenceStep, ...]
    """Sequences whose prompts are scored, a row for each of `score_ids`."""

    @classmethod
    def of(cls, plan: StepPlan, page_size: int) -> "MixedBatch":
        """Lay out a plan.

        Args:
            plan: of at least one step; a step whose token is on the device stands before all of
                several tokens.
            page_size: tokens of a KV page.
        """
        singles = _count_decodes(plan.steps)
        assert all(step.token_ids for step in plan.steps[singles:]), "decoding sequences come first"
        decoded, chunks = _part(plan.steps, singles)
        steps = (*decoded, *chunks)
        counts = np.array([step.count for step in steps], dtype=np.int32)
        lengths = [range(step.start + 1, step.start + step.count + 1) for step in decoded]
        # behind a chunk as a whole
        lengths += [range(end := step.start + step.count, end + 1) for step in chunks]
        drawing = tuple(step for step in steps if step.draws and not step.drafts)
        drafting = tuple(step for step in steps if step.draws and step.drafts)
        scoring = tuple(step for step in steps if step.score_ids)
        end_of = {step.slot: int(end) for step, end in zip(steps, counts.cumsum(), strict=True)}
        rows = [row for step in drawing for row in _rows(step, end_of, 1)]
        rows += [row for step in drafting for row in _rows(step, end_of, step.drafts + 1)]
        rows += [row for step in scoring for row in _rows(step, end_of, len(step.score_ids))]
        positions = [np.arange(step.start, step.start + step.count) for step in steps]
        return cls(
            token_ids=_flatten([step.token_ids or (ON_DEVICE,) for step in steps]),
            positions=_flatten(positions),
            kv_slots=_flatten(
                [_kv_slots(*pair, page_size) for pair in zip(steps, positions, strict=True)]
            ),
            slots=_flatten(
                [[step.slot] * len(each) for step, each in zip(steps, lengths, strict=True)]
            ),
            lengths=_flatten(lengths),
            decodes=sum(step.count for step in decoded),
            cu_seqlens=_flatten([[0], counts[len(decoded) :].cumsum()]),
            logit_rows=np.array(rows or [0], dtype=np.int32),
            drawing=drawing,
            drafting=drafting,
            scoring=scoring,
        )

    @classmethod
    def empty(cls) -> "MixedBatch":
        """Of no tokens, to be filled."""
        nothing = np.zeros(0, dtype=np.int32)
        return cls(
            token_ids=nothing,
            positions=nothing,
            kv_slots=nothing,
            slots=nothing,
            lengths=nothing,
            decodes=0,
            cu_seqlens=np.zeros(1, dtype=np.int32),
            logit_rows=nothing,
            drawing=(),
            drafting=(),
            scoring=(),
        )

    def filled(self, tokens: int, sequences: int, slot: int) -> "MixedBatch":
        """Fill up by tokens of no sequence, which store nothing, and by sequences of no tokens.

        Args:
            tokens: M.
            sequences: B, and R: rows are filled up by the first token's.
            slot: of the sequences that fill up.
        """
        assert not self.decodes, "tokens behind the last chunk are no sequence's"
        return replace(
            self,
            token_ids=_fill(self.token_ids, tokens, 0),
            positions=_fill(self.positions, tokens, 0),
            kv_slots=_fill(self.kv_slots, tokens, NOWHERE),
            slots=_fill(self.slots, sequences, slot),
            lengths=_fill(self.lengths, sequences, 0),
            cu_seqlens=_fill(self.cu_seqlens, sequences + 1, self.cu_seqlens[-1]),
            logit_rows=_fill(self.logit_rows, sequences, 0),
        )


def _count_decodes(steps: Sequence[SequenceStep]) -> int:
    """Leading sequences of one token."""
    return next((i for i, step in enumerate(steps) if step.count > 1), len(steps))


def _part(
    steps: Sequence[SequenceStep], singles: int
) -> tuple[tuple[SequenceStep, ...], tuple[SequenceStep, ...]]:
    """Tell what is decoded, the leading steps of one token and those with drafts, from chunks."""
    rest = steps[singles:]
    drafted = tuple(step for step in rest if step.drafts)
    return (*steps[:singles], *drafted), tuple(step for step in rest if not step.drafts)


def _rows(step: SequenceStep, end_of: Mapping[int, int], count: int) -> range:
    """The last tokens of a step, `count` of them."""
    end = end_of[step.slot]
    return range(end - count, end)


def _flatten(parts: Sequence[Sequence[int] | range | npt.NDArray[np.int64]]) -> Ints:
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _fill(values: Ints, size: int, filling: int) -> Ints:
    return np.concatenate([values, np.full(size - len(values), filling, dtype=np.int32)])


def _kv_slots(
    step: SequenceStep, positions: npt.NDArray[np.int64], page_size: int
) -> npt.NDArray[np.int64]:
    first = step.start // page_size
    last = (step.start + step.count - 1) // page_size
    # only the pages written to: a long context has thousands
    pages = np.array(step.page_ids[first : last + 1], dtype=np.int64)
    return pages[positions // page_size - first] * page_size + positions % page_size
