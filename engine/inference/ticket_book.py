"""All requests that are not answered yet, together with their sequences in the scheduler."""

import logging
import threading
from collections.abc import Callable
from functools import partial

from engine.errors import DeviceFailed, EngineError
from engine.inference.open_request import OpenRequest
from engine.inference.planning import PlannedStep
from engine.inference.scheduler import Scheduler
from engine.inference.sequence import TokenSequence
from engine.inference.steps import Drawn, StepResult

__all__ = ["TicketBook"]

log = logging.getLogger(__name__)


class TicketBook:
    """Keeps tickets and scheduler in step.

    `submit` may be called by any thread; everything else by the engine's thread. Callers' functions
    are called without the lock, and what they raise ends their own request alone.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.changed = threading.Condition()
        """Guards the scheduler; told of new requests."""
        self.scheduler = scheduler
        self.delivered = 0
        """Tokens."""
        self._tickets: dict[TokenSequence, OpenRequest] = {}

    def __len__(self) -> int:
        """Sequences whose answers have not ended."""
        return len(self._tickets)

    def submit(self, ticket: OpenRequest) -> None:
        """Take a request; the caller holds `changed`.

        Raises:
            EngineOverloaded: if too much waits.
        """
        self.scheduler.add(ticket.open_sequences)
        self._tickets.update(dict.fromkeys(ticket.open_sequences, ticket))
        self.changed.notify_all()

    def start(self, sequence: TokenSequence, now_s: float) -> None:
        """Note that a sequence enters its first step."""
        ticket = self._tickets.get(sequence)
        if ticket is not None:
            ticket.start(sequence, now_s)

    def receive(self, planned: PlannedStep, result: StepResult) -> None:
        """Deliver what a step drew; answers that end give their slots up."""
        with self.changed:
            won = self.scheduler.receive(planned, result)
        for sequence, drawn in won:
            ticket = self._tickets.get(sequence)
            # none where another answer to the same request failed a moment ago
            if ticket is not None:
                self._guard(ticket, partial(self._accept, ticket, sequence, drawn))

    def refuse(self, sequence: TokenSequence, error: EngineError) -> None:
        """End the request of a sequence that the runner does not take."""
        ticket = self._tickets.get(sequence)
        if ticket is not None:
            self._fail(ticket, error)

    def end_cancelled(self) -> None:
        """End the requests whose callers went away."""
        for ticket in self._open_tickets():
            self._guard(ticket, partial(self._cancel, ticket))

    def fail_running(self, cause: Exception) -> int:
        """End the requests that have slots, after a fault; returns how many."""
        with self.changed:
            failed = {self._tickets[each]: None for each in self.scheduler.running}
        for ticket in failed:
            error = DeviceFailed()
            error.__cause__ = cause
            self._fail(ticket, error)
        return len(failed)

    def fail_all(self, message: str) -> None:
        """End all requests."""
        for ticket in self._open_tickets():
            self._fail(ticket, EngineError(message))

    def _accept(self, ticket: OpenRequest, sequence: TokenSequence, drawn: Drawn) -> None:
        self.delivered += ticket.accept(sequence, drawn)
        if not ticket.is_open(sequence):
            self._drop(sequence)

    def _cancel(self, ticket: OpenRequest) -> None:
        if ticket.is_cancelled:
            for sequence in ticket.open_sequences:
                self._drop(sequence)
            ticket.end_cancelled()

    def _guard(self, ticket: OpenRequest, action: Callable[[], None]) -> None:
        try:
            action()
        except EngineError as error:
            self._fail(ticket, error)
        except Exception as cause:
            # the text of one answer or the function of one caller is at fault, not the engine
            log.exception("answer_failed")
            failure = EngineError("the answer could not be delivered")
            failure.__cause__ = cause
            self._fail(ticket, failure)

    def _fail(self, ticket: OpenRequest, error: EngineError) -> None:
        for sequence in ticket.sequences:
            self._drop(sequence, is_sound=False)
        try:
            ticket.fail(error)
        except Exception:
            log.exception("delivery_failed")

    def _drop(self, sequence: TokenSequence, *, is_sound: bool = True) -> None:
        with self.changed:
            self.scheduler.finish(sequence, is_sound=is_sound)
            self._tickets.pop(sequence, None)

    def _open_tickets(self) -> list[OpenRequest]:
        with self.changed:
            return list(dict.fromkeys(self._tickets.values()))
