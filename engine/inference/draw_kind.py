"""How much a draw has to look at; a batch pays for what its sequences ask for, no more."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Self

from engine.inference.sampling_params import SamplingParams

__all__ = ["DrawKind"]


class DrawKind(StrEnum):
    """Every kind draws the same token where its row needs no more than it looks at."""

    PLAIN = "plain"
    """Temperature and seed."""
    LIMITED = "limited"
    """Also top_k, top_p and min_p."""
    FULL = "full"
    """Also penalties, biases, ends held back, guides and log-probabilities."""

    @classmethod
    def of(cls, sequences: Iterable[SamplingParams]) -> Self:
        """Find the least that does for all of a batch."""
        asked = list(sequences)
        if not all(params.is_plain for params in asked):
            return cls("full")
        return cls("limited" if any(params.is_limited for params in asked) else "plain")

    @property
    def is_full(self) -> bool:
        """Whether rules and log-probabilities are looked at."""
        return self is DrawKind.FULL

    @property
    def is_limited(self) -> bool:
        """Whether top_k, top_p and min_p are."""
        return self is not DrawKind.PLAIN
