"""What a step drew and scored, on its way to the host while the device goes on.

    device   ... forward t | draw t | forward t + 1        | draw t + 1 ...
    copies                          | tokens of t to host
    host       launch t + 1                          wait t: of this copy alone

Copies run on a stream of their own: in the stream of the steps each would hold up the next one.
Host buffers take turns; one that nobody has waited for yet is read before it is used again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

import numpy as np
import torch

from engine.errors import GuideFailed
from engine.inference.steps import Drawn, SequenceStep, StepResult, TokenLogprobs
from kernels.token_logprobs import RowLogprobs

__all__ = ["LaunchedStep", "Reading", "StepResults"]

BUFFERS = 3
Accept = Callable[[int, Sequence[int]], GuideFailed | None]
"""Takes a slot and its tokens; says why its guide allowed none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Whose tokens lie where in what was drawn."""

    drawing: tuple[SequenceStep, ...] = ()
    """One token each."""
    drafting: tuple[SequenceStep, ...] = ()
    """Behind them, as many tokens each as it has drafts, and one."""
    scoring: tuple[SequenceStep, ...] = ()
    """As many scores each as it has `score_ids`, in a buffer of their own."""
    tops: Mapping[int, int] = field(default_factory=dict)
    """How many of the likeliest tokens a slot wants reported, for those that want any or none."""
    guided: tuple[int, ...] = ()
    """Slots whose guides wait for the token."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return len(self.drawing) + sum(step.drafts + 1 for step in self.drafting)

    @property
    def scores(self) -> int:
        """Of all sequences."""
        return sum(len(step.score_ids) for step in self.scoring)


class StepResults:
    """Copies what steps draw to pinned memory."""

    def __init__(
        self, drawn: torch.Tensor, logprobs: RowLogprobs, scores: RowLogprobs, accept: Accept
    ) -> None:
        """Prepare.

        Args:
            drawn: int32, where steps leave their tokens.
            logprobs: where full draws leave log-probabilities.
            scores: where steps leave those of prompts.
            accept: told the tokens of guided slots, once, when they are waited for.
        """
        self._accept = accept
        self._stream = torch.cuda.Stream(drawn.device) if drawn.is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = cycle([_HostBuffer(drawn, logprobs, scores) for _ in range(BUFFERS)])
        self._last: _HostBuffer | None = None

    def allow_writing(self) -> None:
        """Let the current stream wait until what was drawn before has been read."""
        if self._last is not None:
            self._last.hold()

    def read(self, reading: Reading) -> "LaunchedStep":
        """Start the copy behind what the current stream does."""
        buffer = next(self._buffers)
        if buffer.step is not None:
            buffer.step.wait()
        buffer.copy(reading, self._stream)
        buffer.step = LaunchedStep(buffer, reading, self._accept)
        self._last = buffer
        return buffer.step


class LaunchedStep:
    """A `PendingStep`: its tokens are on their way."""

    def __init__(self, buffer: "_HostBuffer", reading: Reading, accept: Accept) -> None:
        self._buffer, self._reading, self._accept = buffer, reading, accept
        self._result: StepResult | None = None

    def wait(self) -> StepResult:
        """See `engine.inference.steps.PendingStep`."""
        if self._result is None:
            drawn = self._buffer.interpret(self._reading)
            self._buffer.step = None
            for slot in self._reading.guided:
                failure = self._accept(slot, drawn[slot].token_ids)
                drawn[slot] = replace(drawn[slot], failure=failure)
            self._result = StepResult(drawn=drawn)
        return self._result


class _HostBuffer:
    """Pinned copies of the buffers of one step."""

    def __init__(self, drawn: torch.Tensor, logprobs: RowLogprobs, scores: RowLogprobs) -> None:
        self.step: LaunchedStep | None = None
        self._drawn, self._logprobs, self._scores = drawn, logprobs, scores
        on_gpu = drawn.is_cuda
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._tokens = _pinned_like(drawn)
        self._logprob_copies, self._score_copies = _pinned_rows(logprobs), _pinned_rows(scores)

    def hold(self) -> None:
        if self._event is not None:
            self._event.wait()

    def copy(self, reading: Reading, stream: torch.cuda.Stream | None) -> None:
        if stream is None or self._event is None:
            self._enqueue(reading)
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._enqueue(reading)
            self._event.record(stream)

    def interpret(self, reading: Reading) -> dict[int, Drawn]:
        if self._event is not None:
            self._event.synchronize()
        tokens = self._tokens[: reading.tokens].tolist()
        drawn: dict[int, Drawn] = {}
        for row, step in enumerate(reading.drawing):
            drawn[step.slot] = Drawn(
                token_ids=(tokens[row],), logprobs=self._logprobs_of(row, step.slot, reading)
            )
        at = len(reading.drawing)
        for step in reading.drafting:
            found = tokens[at : at + step.drafts + 1]
            drawn[step.slot] = Drawn(token_ids=_accepted(step.token_ids[-step.drafts :], found))
            at += step.drafts + 1
        at = 0
        for step in reading.scoring:
            scores = _tell(self._score_copies, at, step.score_ids, step.score_top)
            drawn[step.slot] = Drawn(scores=scores)
            at += len(step.score_ids)
        return drawn

    def _enqueue(self, reading: Reading) -> None:
        count = reading.tokens
        self._tokens[:count].copy_(self._drawn[:count], non_blocking=True)
        if reading.tops:
            _copy_rows(self._logprobs, self._logprob_copies, len(reading.drawing))
        if reading.scoring:
            _copy_rows(self._scores, self._score_copies, reading.scores)

    def _logprobs_of(self, row: int, slot: int, reading: Reading) -> tuple[TokenLogprobs, ...]:
        if slot not in reading.tops:
            return ()
        token_id = int(self._tokens[row])
        return _tell(self._logprob_copies, row, (token_id,), reading.tops[slot])


def _tell(
    rows: RowLogprobs, first: int, token_ids: Sequence[int], top: int
) -> tuple[TokenLogprobs, ...]:
    """Put rows into words, one for each of some tokens, from the first row on."""
    place = slice(first, first + len(token_ids))
    found = zip(
        token_ids,
        rows.chosen[place].tolist(),
        rows.top_ids[place, :top].tolist(),
        rows.top[place, :top].tolist(),
        strict=True,
    )
    return tuple(
        TokenLogprobs(
            token_id=token_id,
            logprob=logprob,
            # a small vocabulary may have fewer tokens than are asked for
            top=tuple(pair for pair in zip(ids, values, strict=True) if pair[0] >= 0),
        )
        for token_id, logprob, ids, values in found
    )


def _accepted(drafts: tuple[int, ...], found: list[int]) -> tuple[int, ...]:
    """The drafts that were drawn indeed, and the token behind them."""
    matches = np.equal(drafts, found[: len(drafts)])
    count = len(drafts) if matches.all() else int(matches.argmin())
    return tuple(found[: count + 1])


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _pinned_rows(rows: RowLogprobs) -> RowLogprobs:
    return RowLogprobs(
        chosen=_pinned_like(rows.chosen),
        top=_pinned_like(rows.top),
        top_ids=_pinned_like(rows.top_ids),
    )


def _copy_rows(source: RowLogprobs, target: RowLogprobs, count: int) -> None:
    for name in RowLogprobs.__slots__:
        getattr(target, name)[:count].copy_(getattr(source, name)[:count], non_blocking=True)
