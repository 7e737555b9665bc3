"""One step as it is put together, and how its tokens are shared out; no tensors."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Self

from engine.inference.sequence import TokenSequence
from engine.inference.steps import MAX_SCORED_TOKENS, SequenceStep, StepPlan

__all__ = ["PlannedStep", "StepBuilder", "share_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A plan, and whose it is."""

    number: int
    """Steps are numbered from 0 in the order of their launches."""
    plan: StepPlan
    sequences: tuple[TokenSequence, ...]
    """Of `plan.steps`, in their order."""
    tenures: tuple[int, ...]
    """Which slot of its life each sequence had."""
    started: tuple[TokenSequence, ...]
    """Those whose slots are to be opened before the launch."""

    def without(self, refused: Collection[TokenSequence]) -> Self:
        """Leave out sequences that the runner does not take; there may be no step left."""
        kept = [place for place, sequence in enumerate(self.sequences) if sequence not in refused]
        return replace(
            self,
            plan=StepPlan(steps=tuple(self.plan.steps[place] for place in kept)),
            sequences=tuple(self.sequences[place] for place in kept),
            tenures=tuple(self.tenures[place] for place in kept),
        )


class StepBuilder:
    """Collects what sequences do in a step, and moves them on."""

    def __init__(self, number: int, tokens: int) -> None:
        self.number = number
        self.left = tokens
        """Tokens that the step can still take."""
        self.scores_left = MAX_SCORED_TOKENS
        """How many of them can be scored."""
        self._decodes: list[tuple[TokenSequence, SequenceStep]] = []
        self._chunks: list[tuple[TokenSequence, SequenceStep]] = []
        self._started: list[TokenSequence] = []

    def has(self, sequence: TokenSequence) -> bool:
        """Whether a sequence does something in this step."""
        return sequence.last_step == self.number

    def start(self, sequence: TokenSequence) -> None:
        """Have the sequence's slot opened."""
        self._started.append(sequence)

    def add(
        self, sequence: TokenSequence, token_ids: tuple[int, ...], *, draws: bool, drafts: int = 0
    ) -> None:
        """Compute tokens of a running sequence that has the pages for them."""
        step = SequenceStep(
            slot=sequence.slot,
            start=sequence.computed,
            token_ids=token_ids,
            page_ids=sequence.pages,
            draws=draws,
            drafts=drafts,
            score_ids=sequence.score_ids(sequence.computed + len(token_ids)),
            score_top=sequence.score_top or 0,
        )
        (self._decodes if step.count == 1 and draws else self._chunks).append((sequence, step))
        self.left -= step.count
        self.scores_left -= len(step.score_ids)
        # of the drafts it shows later how many are computed tokens of the sequence
        sequence.computed += step.count - drafts
        sequence.last_step = self.number
        if draws:
            sequence.pending += 1
            sequence.has_drawn_here = True

    def build(self) -> PlannedStep | None:
        """The step, or None if nothing is done in it."""
        entries = [*self._decodes, *self._chunks]
        if not entries:
            return None
        return PlannedStep(
            number=self.number,
            plan=StepPlan(steps=tuple(step for _, step in entries)),
            sequences=tuple(sequence for sequence, _ in entries),
            tenures=tuple(sequence.tenure for sequence, _ in entries),
            started=tuple(self._started),
        )


def share_tokens(demand: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Share a step's tokens out: equal parts, and what one tenant does not need to the others.

    Args:
        demand: tokens that each tenant could use.
        tokens: how many there are.
    """
    shares: dict[str, int] = {}
    by_need = sorted(demand, key=lambda tenant: demand[tenant])
    for place, tenant in enumerate(by_need):
        # what does not divide goes to those who need most
        shares[tenant] = min(demand[tenant], tokens // (len(by_need) - place))
        tokens -= shares[tenant]
    return shares
