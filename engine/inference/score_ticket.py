"""One prompt to score, and the caller that waits for it; no tensors."""

import math
from collections.abc import Callable
from concurrent.futures import Future

from engine.errors import EngineError, NoTokenDrawn
from engine.inference.sequence import TokenSequence
from engine.inference.steps import Drawn, TokenLogprobs

__all__ = ["ScoreTicket"]


class ScoreTicket:
    """An `engine.inference.open_request.OpenRequest`; `wait` alone is for the caller's thread."""

    def __init__(self, sequence: TokenSequence, is_cancelled: Callable[[], bool]) -> None:
        """Nothing is scored yet.

        Args:
            sequence: of the prompt.
            is_cancelled: asked in every step.
        """
        self.sequences = (sequence,)
        self._missing = len(sequence.prompt_ids) - 1
        self._is_cancelled = is_cancelled
        # nothing stands before the first token
        self._scores: list[TokenLogprobs | None] = [None]
        self._outcome: Future[tuple[TokenLogprobs | None, ...]] = Future()

    @property
    def open_sequences(self) -> tuple[TokenSequence, ...]:
        """See `OpenRequest.open_sequences`."""
        return () if self._outcome.done() else self.sequences

    @property
    def is_cancelled(self) -> bool:
        """See `OpenRequest.is_cancelled`."""
        return self._is_cancelled()

    def is_open(self, sequence: TokenSequence) -> bool:
        """See `OpenRequest.is_open`."""
        return sequence in self.open_sequences

    def start(self, sequence: TokenSequence, now_s: float) -> None:
        """See `OpenRequest.start`; nobody is told how long a prompt waited."""

    def accept(self, sequence: TokenSequence, drawn: Drawn) -> int:
        """See `OpenRequest.accept`; no score is a token delivered."""
        if any(math.isnan(score.logprob) for score in drawn.scores):
            raise NoTokenDrawn
        self._scores += drawn.scores
        self._missing -= len(drawn.scores)
        if not self._missing:
            self.end_cancelled()
        return 0

    def end_cancelled(self) -> None:
        """Give the caller the scores that there are."""
        self._outcome.set_result(tuple(self._scores))

    def fail(self, error: EngineError) -> None:
        """See `OpenRequest.fail`."""
        self._outcome.set_exception(error)

    def wait(self) -> tuple[TokenLogprobs | None, ...]:
        """Block until all tokens are scored, or the engine's thread found the caller gone.

        Raises:
            EngineError: as it ended the request.
        """
        return self._outcome.result()
