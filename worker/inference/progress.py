"""How far a model is on its way into memory."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["LoadProgress", "LoadStage", "ProgressSink"]


class LoadStage(StrEnum):
    """What loading is about."""

    QUEUED = "queued"
    """Another model is being loaded, or room is being made."""
    VERIFYING = "verifying"
    """Every file is held against its hash."""
    READING = "reading"
    """Weights go to the device, and what products read is derived from them."""
    WARMING_UP = "warming_up"
    """First tokens: what is slow once, or fails at all, does so here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """A stage, and how much of the whole way is behind it."""

    stage: LoadStage
    fraction: float
    """0 to 1."""


ProgressSink = Callable[[LoadProgress], None]
"""Told from the thread that loads."""
