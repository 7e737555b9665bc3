"""What tenants get of a step: tokens, and of these the few that can be scored; no tensors.

A tenant's demand for tokens counts no more of the scored ones than its share of these, so that the
rest of the step is for others.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from engine.inference.planning import StepBuilder, share_tokens
from engine.inference.sequence import TokenSequence

__all__ = ["Ration", "Rations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ration:
    """Tokens of one kind by tenant."""

    shares: Counter[str]
    """What a tenant gets."""
    rooms: Counter[str]
    """What is left of it, where not negative, for prompts that wait."""

    @classmethod
    def of(cls, begun: Counter[str], waiting: Counter[str], tokens: int) -> Self:
        """Share tokens out.

        Args:
            begun: needed by prompts that run.
            waiting: by prompts that wait.
            tokens: how many there are.
        """
        shares = Counter(share_tokens(begun + waiting, tokens))
        rooms = Counter({tenant: shares[tenant] - begun[tenant] for tenant in shares})
        return cls(shares=shares, rooms=rooms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rations:
    """What a step has for prompts."""

    tokens: Ration
    scores: Ration
    """Of the tokens, those that can be scored."""

    @classmethod
    def of(
        cls, begun: Iterable[TokenSequence], waiting: Iterable[TokenSequence], step: StepBuilder
    ) -> Self:
        """Share out what a step has left.

        Args:
            begun: prompts that run.
            waiting: those that wait, where one can start.
            step: decoding sequences are in it.
        """
        needs, demand = _Needs.of(begun), _Needs.of(waiting)
        scores = Ration.of(needs.scores, demand.scores, min(step.scores_left, step.left))
        # what runs comes before what waits
        running = scores.shares & needs.scores
        tokens = Ration.of(
            needs.plain + running, demand.plain + (scores.shares - running), step.left
        )
        return cls(tokens=tokens, scores=scores)

    def have_room(self, sequence: TokenSequence) -> bool:
        """Whether a sequence that waits could compute something."""
        if self.tokens.rooms[sequence.tenant] <= 0:
            return False
        return not sequence.to_score or self.scores.rooms[sequence.tenant] > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needs:
    """Tokens that sequences are to compute, by tenant."""

    plain: Counter[str]
    scores: Counter[str]

    @classmethod
    def of(cls, sequences: Iterable[TokenSequence]) -> Self:
        plain, scores = Counter[str](), Counter[str]()
        for sequence in sequences:
            scores[sequence.tenant] += sequence.to_score
            plain[sequence.tenant] += sequence.remaining - sequence.to_score
        return cls(plain=plain, scores=scores)
