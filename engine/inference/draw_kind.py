"""How much a draw has to look at; a batch pays for what its sequences ask for, no more."""

from enum import StrEnum

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
    def of(cls, params: SamplingParams) -> "DrawKind":
        """Find the least that does for a sequence."""
        if not params.is_plain:
            return cls.FULL
        return cls.LIMITED if params.is_limited else cls.PLAIN

    @property
    def is_full(self) -> bool:
        """Whether rules and log-probabilities are looked at."""
        return self is DrawKind.FULL

    @property
    def is_limited(self) -> bool:
        """Whether top_k, top_p and min_p are."""
        return self is not DrawKind.PLAIN
