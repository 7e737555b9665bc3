"""What a step drew, on its way to the host while the device goes on.

    device   ... forward t | draw t | forward t + 1        | draw t + 1 ...
    copies                          | tokens of t to host
    host       launch t + 1                          wait t: of this copy alone

Copies run on a stream of their own: in the stream of the steps each would hold up the next one.
Host buffers take turns; one that nobody has waited for yet is read before it is used again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
import torch

from engine.inference.steps import Drawn, SequenceStep, StepResult, TokenLogprobs
from kernels.token_logprobs import RowLogprobs

__all__ = ["LaunchedStep", "Reading", "StepResults"]

BUFFERS = 3
Accept = Callable[[int, Sequence[int]], None]
"""Takes a slot and its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Whose tokens lie where in what was drawn."""

    drawing: tuple[SequenceStep, ...] = ()
    """One token each."""
    drafting: tuple[SequenceStep, ...] = ()
    """Behind them, as many tokens each as it has drafts, and one."""
    tops: Mapping[int, int] = field(default_factory=dict)
    """How many of the likeliest tokens a slot wants reported, for those that want any or none."""
    guided: tuple[int, ...] = ()
    """Slots whose guides wait for the token."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return len(self.drawing) + sum(step.drafts + 1 for step in self.drafting)


class StepResults:
    """Copies what steps draw to pinned memory."""

    def __init__(self, drawn: torch.Tensor, logprobs: RowLogprobs, accept: Accept) -> None:
        """Prepare.

        Args:
            drawn: int32, where steps leave their tokens.
            logprobs: where full draws leave log-probabilities.
            accept: told the tokens of guided slots, once, when they are waited for.
        """
        self._accept = accept
        self._stream = torch.cuda.Stream(drawn.device) if drawn.is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = cycle([_HostBuffer(drawn, logprobs) for _ in range(BUFFERS)])
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
            self._result = self._buffer.interpret(self._reading)
            self._buffer.step = None
            for slot in self._reading.guided:
                self._accept(slot, self._result.drawn[slot].token_ids)
        return self._result


class _HostBuffer:
    """Pinned copies of the buffers of one step."""

    def __init__(self, drawn: torch.Tensor, logprobs: RowLogprobs) -> None:
        self.step: LaunchedStep | None = None
        self._drawn, self._logprobs = drawn, logprobs
        on_gpu = drawn.is_cuda
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._tokens = _pinned_like(drawn)
        self._copies = RowLogprobs(
            chosen=_pinned_like(logprobs.chosen),
            top=_pinned_like(logprobs.top),
            top_ids=_pinned_like(logprobs.top_ids),
        )

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

    def interpret(self, reading: Reading) -> StepResult:
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
        return StepResult(drawn=drawn)

    def _enqueue(self, reading: Reading) -> None:
        count = reading.tokens
        self._tokens[:count].copy_(self._drawn[:count], non_blocking=True)
        if reading.tops:
            rows = len(reading.drawing)
            for name in RowLogprobs.__slots__:
                source = getattr(self._logprobs, name)[:rows]
                getattr(self._copies, name)[:rows].copy_(source, non_blocking=True)

    def _logprobs_of(self, row: int, slot: int, reading: Reading) -> tuple[TokenLogprobs, ...]:
        if slot not in reading.tops:
            return ()
        count = reading.tops[slot]
        ids = self._copies.top_ids[row, :count].tolist()
        values = self._copies.top[row, :count].tolist()
        return (
            TokenLogprobs(
                token_id=int(self._tokens[row]),
                logprob=float(self._copies.chosen[row]),
                # a small vocabulary may have fewer tokens than are asked for
                top=tuple(pair for pair in zip(ids, values, strict=True) if pair[0] >= 0),
            ),
        )


def _accepted(drafts: tuple[int, ...], found: list[int]) -> tuple[int, ...]:
    """The drafts that were drawn indeed, and the token behind them."""
    matches = np.equal(drafts, found[: len(drafts)])
    count = len(drafts) if matches.all() else int(matches.argmin())
    return tuple(found[: count + 1])


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
