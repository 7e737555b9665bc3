"""A request inside the engine, whatever it asks for."""

from typing import Protocol

from engine.errors import EngineError
from engine.inference.sequence import TokenSequence
from engine.inference.steps import Drawn

__all__ = ["OpenRequest"]


class OpenRequest(Protocol):
    """What the engine's thread tells a request, and asks it."""

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """All of them, ended ones too."""

    @property
    def open_sequences(self) -> tuple[TokenSequence, ...]:
        """Those that have not ended."""

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller went away."""

    def is_open(self, sequence: TokenSequence) -> bool:
        """Whether a sequence has not ended."""

    def start(self, sequence: TokenSequence, now_s: float) -> None:
        """Note that a sequence enters its first step."""

    def accept(self, sequence: TokenSequence, drawn: Drawn) -> int:
        """Take what a sequence won in a step.

        Returns:
            How many tokens were delivered.

        Raises:
            GuideFailed: if the guide cannot be followed any further.
            NoTokenDrawn: if a logit was not finite.
        """

    def end_cancelled(self) -> None:
        """Tell the caller that this is all."""

    def fail(self, error: EngineError) -> None:
        """Tell the caller an error instead of what is missing."""
