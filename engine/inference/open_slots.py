"""What the sequences in a runner's slots ask of their draws, looked up in every step."""

from collections.abc import Iterable, Sequence

from engine.inference.draw_kind import DrawKind
from engine.inference.sampling_params import SamplingParams
from engine.inference.steps import SequenceStep

__all__ = ["OpenSlots"]


class OpenSlots:
    """Slots that are taken; exceptions are kept apart, since most sequences ask for little."""

    def __init__(self) -> None:
        self._kinds: dict[int, DrawKind] = {}
        self._verifiable: set[int] = set()
        self._guided: set[int] = set()
        self._tops: dict[int, int] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._kinds

    def add(self, slot: int, params: SamplingParams) -> None:
        """Take a slot."""
        self._kinds[slot] = DrawKind.of(params)
        if params.is_plain and params.is_greedy:
            self._verifiable.add(slot)
        if params.guide is not None:
            self._guided.add(slot)
        if params.logprobs is not None:
            self._tops[slot] = params.logprobs

    def remove(self, slot: int) -> None:
        """Free a slot."""
        del self._kinds[slot]
        self._verifiable.discard(slot)
        self._guided.discard(slot)
        self._tops.pop(slot, None)

    def can_verify(self, slot: int) -> bool:
        """Whether its next token is the likeliest, so that a guess can be right."""
        return slot in self._verifiable

    def kind_of(self, steps: Iterable[SequenceStep]) -> DrawKind:
        """Find the least that does for all of a batch."""
        kinds = {self._kinds[step.slot] for step in steps}
        return next(
            (kind for kind in (DrawKind.FULL, DrawKind.LIMITED) if kind in kinds), DrawKind.PLAIN
        )

    def guided(self, steps: Sequence[SequenceStep]) -> tuple[int, ...]:
        """Slots whose sequences follow a guide."""
        if not self._guided:
            return ()
        return tuple(step.slot for step in steps if step.slot in self._guided)

    def tops(self, steps: Sequence[SequenceStep]) -> dict[int, int]:
        """How many of the likeliest tokens a slot wants reported, where it wants any or none."""
        if not self._tops:
            return {}
        return {s.slot: self._tops[s.slot] for s in steps if s.slot in self._tops}
