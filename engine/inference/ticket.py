"""One request inside the engine: its answers, whom they go to, and whether he still listens."""

import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from typing_extensions import override

from engine.errors import EngineError
from engine.inference.answer import Answer
from engine.inference.request import GenerationChunk
from engine.inference.sequence import TokenSequence
from engine.inference.steps import Drawn

__all__ = ["ChunkQueue", "ChunkStream", "Delivery", "Ticket", "never_cancelled"]

Delivery = Callable[[GenerationChunk | EngineError], None]
"""Takes chunks, or the error that ends the request; called in the engine's thread, so it returns at
once and calls nothing of the engine but `Ticket.cancel`."""

ChunkQueue = queue.SimpleQueue[GenerationChunk | EngineError]


def never_cancelled() -> bool:
    """Let a generation run to its end."""
    return False


class Ticket:
    """An `engine.inference.open_request.OpenRequest` for answers.

    The engine's thread alone calls what has no other remark.
    """

    def __init__(
        self,
        answers: Mapping[TokenSequence, Answer],
        deliver: Delivery,
        is_cancelled: Callable[[], bool],
        submitted_s: float,
    ) -> None:
        """Nothing is answered yet.

        Args:
            answers: by sequence, in the order of their indices.
            deliver: where chunks go.
            is_cancelled: asked in every step.
            submitted_s: on the monotonic clock.
        """
        self._answers = dict(answers)
        self._index = {sequence: index for index, sequence in enumerate(answers)}
        self._queue_s = dict.fromkeys(answers, 0.0)
        self._submitted_s = submitted_s
        self._deliver = deliver
        self._is_cancelled = is_cancelled
        self._gave_up = False
        self.sequences = tuple(answers)
        """All of them, ended ones too."""

    @property
    def open_sequences(self) -> tuple[TokenSequence, ...]:
        """Those whose answers have not ended."""
        return tuple(self._answers)

    def is_open(self, sequence: TokenSequence) -> bool:
        """Whether a sequence's answer has not ended."""
        return sequence in self._answers

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller went away."""
        return self._gave_up or self._is_cancelled()

    def cancel(self) -> None:
        """End all answers within a step; may be called in any thread, and more than once."""
        self._gave_up = True

    def start(self, sequence: TokenSequence, now_s: float) -> None:
        """Note that a sequence enters its first step."""
        self._queue_s[sequence] = now_s - self._submitted_s

    def accept(self, sequence: TokenSequence, drawn: Drawn) -> int:
        """Deliver what the tokens of a step say, up to where the answer ends.

        Returns:
            How many of the tokens belong to the answer.

        Raises:
            GuideFailed: if the guide cannot be followed any further.
            NoTokenDrawn: if a logit was not finite.
        """
        if drawn.failure is not None:
            raise drawn.failure
        answer = self._answers[sequence]
        for place, token_id in enumerate(drawn.token_ids):
            chunk = replace(
                answer.accept(token_id),
                index=self._index[sequence],
                token_id=token_id,
                logprobs=drawn.logprobs[place] if drawn.logprobs else None,
                cached_tokens=sequence.cached_tokens,
                queue_s=self._queue_s[sequence],
            )
            if chunk.finish_reason is not None:
                del self._answers[sequence]
                self._deliver(chunk)
                return place + 1
            self._deliver(chunk)
        return len(drawn.token_ids)

    def end_cancelled(self) -> None:
        """Deliver the ends of all open answers."""
        for sequence, answer in self._answers.items():
            self._deliver(replace(answer.cancel(), index=self._index[sequence]))
        self._answers = {}

    def fail(self, error: EngineError) -> None:
        """Deliver an error instead of what is missing."""
        self._answers = {}
        self._deliver(error)


class ChunkStream(Iterator[GenerationChunk]):
    """The chunks of one request for a thread that waits for them."""

    def __init__(self, arrived: ChunkQueue, ticket: Ticket) -> None:
        """Nothing was read yet.

        Args:
            arrived: where the ticket delivers. The ticket does not know the stream, so that a
                forgotten stream is noticed.
            ticket: of a request that was taken.
        """
        self._arrived = arrived
        self._ticket = ticket
        self._open = len(ticket.sequences)

    @override
    def __next__(self) -> GenerationChunk:
        if self._open <= 0:
            raise StopIteration
        item = self._arrived.get()
        if isinstance(item, EngineError):
            self._open = 0
            raise item
        self._open -= item.finish_reason is not None
        return item

    def close(self) -> None:
        """Cancel what is left; chunks that came are forgotten."""
        self._open = 0
        self._ticket.cancel()

    def __del__(self) -> None:
        # a reader that forgets the stream must not keep a slot
        self._ticket.cancel()
