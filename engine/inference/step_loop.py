"""The engine's thread: plan, launch, plan and launch the next, wait for the first, deliver it.

The host works one step ahead of the results, so the device always has a step to do. What a fault
leaves behind is decided here too: who fails, and whether the engine goes on.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import EngineError
from engine.inference.faults import let_go_of_frames
from engine.inference.limits import RunnerShape
from engine.inference.open_request import OpenRequest
from engine.inference.planning import PlannedStep
from engine.inference.sequence import SequenceState, TokenSequence
from engine.inference.statistics import StepClock
from engine.inference.steps import PendingStep, Runner, StepResult
from engine.inference.ticket_book import TicketBook

__all__ = ["StepLoop"]

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""How often an idle engine shows that it lives."""
UNLOADED = "the model was unloaded"
STOPPED = "the engine stopped after a fault of the device; load the model again"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    planned: PlannedStep
    pending: PendingStep
    launched_s: float


class _Nothing:
    """What a step without sequences draws."""

    def wait(self) -> StepResult:
        return StepResult(drawn={})


class StepLoop:
    """Runs a scheduler's plans on a runner until it is closed."""

    def __init__(
        self, runner: Runner, book: TicketBook, reopen: Callable[[], Runner] | None
    ) -> None:
        """Start the thread.

        Args:
            runner: belongs to the thread from now on.
            book: of requests and their sequences.
            reopen: makes another runner of the same shape after a fault.
        """
        self.clock = StepClock(beat_s=time.monotonic())
        self.faults = 0
        """Exceptions of the runner."""
        self._runner: Runner | None = runner
        self._shape = RunnerShape.of(runner)
        self._book = book
        self._reopen = reopen
        self._in_flight: deque[_Flight] = deque()
        self._end: str | None = None
        self._has_run = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def end(self) -> str | None:
        """Why nothing is answered any more."""
        return self._end

    def submit(self, ticket: OpenRequest) -> None:
        """Take a request.

        Raises:
            EngineOverloaded: if too much waits.
            EngineError: if the loop ended.
        """
        with self._book.changed:
            self.check_open()
            self._book.submit(ticket)

    def check_open(self) -> None:
        """Refuse what comes too late.

        Raises:
            EngineError: if the loop ended.
        """
        if self._end is not None:
            raise EngineError(self._end)

    def close(self) -> None:
        """End all requests with an error, then the thread; may be called again."""
        with self._book.changed:
            self._end = self._end or UNLOADED
            self._book.changed.notify_all()
        # a caller's function may close the engine out of the thread itself
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._has_work():
                try:
                    self._turn()
                except Exception as error:
                    log.exception("engine_step_failed")
                    self._recover(error)
        finally:
            # whatever happened, nobody waits for an answer that cannot come
            self._shut_down()

    def _has_work(self) -> bool:
        """Block until there is something to do; False once the loop is to end."""
        changed = self._book.changed
        with changed:
            self.clock.beat_s = time.monotonic()
            while self._end is None and not len(self._book) and not self._in_flight:
                changed.wait(BEAT_S)
                self.clock.beat_s = time.monotonic()
            return self._end is None

    def _turn(self) -> None:
        self._book.end_cancelled()
        with self._book.changed:
            planned = self._book.scheduler.plan()
            # a request that comes right behind the lock is not in the plan and no sign of a stall
            is_stalled = planned is None and not self._in_flight and len(self._book) > 0
        assert not is_stalled, "sequences wait and nothing can be planned"
        self._close_slots()
        if planned is not None:
            self._launch(planned)
        if self._in_flight and (planned is None or len(self._in_flight) > 1):
            self._receive()

    def _launch(self, planned: PlannedStep) -> None:
        now = time.monotonic()
        refused = [each for each in planned.started if not self._open(each, now)]
        if refused:
            planned = planned.without(refused)
        # the numbers of steps have no gaps, so one of which nothing is left is received too
        pending = self._live_runner().launch(planned.plan) if planned.sequences else _Nothing()
        self._in_flight.append(_Flight(planned=planned, pending=pending, launched_s=now))

    def _open(self, sequence: TokenSequence, now_s: float) -> bool:
        # one before it may have ended the request that both belong to
        if sequence.state is not SequenceState.RUNNING:
            return False
        known = len(sequence.prompt_ids)
        try:
            self._live_runner().open(
                sequence.slot, sequence.sampling, sequence.prompt_ids, sequence.tokens[known:]
            )
        except EngineError as error:
            self._book.refuse(sequence, error)
            return False
        if sequence.tenure == 1:
            self._book.start(sequence, now_s)
        return True

    def _receive(self) -> None:
        flight = self._in_flight.popleft()
        result = flight.pending.wait()
        self.clock.add(flight.launched_s, time.monotonic())
        self._has_run = True
        self._book.receive(flight.planned, result)
        self._close_slots()

    def _close_slots(self) -> None:
        with self._book.changed:
            closed = self._book.scheduler.take_closed()
        for slot in closed:
            self._live_runner().close(slot)

    def _recover(self, cause: Exception) -> None:
        """Fail what ran and make a new runner, or end."""
        self.faults += 1
        self._in_flight.clear()
        if self._reopen is None:
            # told first: who sends a failed request again finds it
            self._stop(STOPPED)
        failed = self._book.fail_running(cause)
        self._runner = None
        # frames of the fault and cycles hold the old runner, and there is no memory for two
        let_go_of_frames(cause)
        gc.collect()
        # a fault of a new runner that nobody's request brought about would come again and again
        if self._reopen is None or not (failed or self._has_run):
            self._stop(STOPPED)
            return
        self._has_run = False
        try:
            self._runner = self._reopen()
        except Exception:
            log.exception("reopening_failed")
            self._stop(STOPPED)
            return
        if RunnerShape.of(self._runner) != self._shape:
            self._stop(f"{STOPPED}; it came back with other buffers")
            return
        with self._book.changed:
            self._book.scheduler.restart()

    def _stop(self, reason: str) -> None:
        with self._book.changed:
            self._end = self._end or reason

    def _shut_down(self) -> None:
        self._stop(STOPPED)
        self._book.fail_all(self._end or STOPPED)
        try:
            # memory that the device still writes to is not given back
            for flight in self._in_flight:
                flight.pending.wait()
        except Exception:
            log.exception("last_step_failed")
        self._in_flight.clear()
        self._runner = None

    def _live_runner(self) -> Runner:
        assert self._runner is not None, "a runner lives as long as steps are planned"
        return self._runner
