"""Work that the supervisor does itself, in a thread, so that its lease is renewed meanwhile."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["BackgroundWork", "Reporter", "WorkStopped"]

T = TypeVar("T")


class WorkStopped(Exception):
    """The work was asked to stop."""


class Reporter:
    """What a piece of work is given to say how far it is, and to learn that it must stop."""

    def __init__(self) -> None:
        self.records: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()

    def report(self, type: str, **data: Any) -> None:  # noqa: A002 - the event's own field name
        """Record an event.

        Raises:
            WorkStopped: if the work was asked to stop.
        """
        self.check()
        self.records.put({"type": type, **data})

    def check(self) -> None:
        """Raise `WorkStopped` if the work was asked to stop."""
        if self._stop.is_set():
            raise WorkStopped

    def pause(self, seconds: float) -> None:
        """Sleep, or raise `WorkStopped` as soon as the work is asked to stop."""
        self._stop.wait(seconds)
        self.check()

    def ask_to_stop(self) -> None:
        """Make the next `report`, `check` or `pause` raise."""
        self._stop.set()


class BackgroundWork(Generic[T]):
    """A function running in a thread of its own; same use as a `ChildProcess`."""

    def __init__(self, run: Callable[[Reporter], T], *, name: str) -> None:
        self._run = run
        self._reporter = Reporter()
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._is_abandoned = False
        # a daemon: a transfer that hangs must not keep a stopping worker alive
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call; waits at most `timeout_s` for the first."""
        taken: list[dict[str, Any]] = []
        if self._thread.is_alive():
            self._thread.join(timeout_s if self._reporter.records.empty() else 0)
        while not self._reporter.records.empty():
            taken.append(self._reporter.records.get())
        return taken

    @property
    def is_done(self) -> bool:
        """True when the function returned or was given up, and its events were taken."""
        is_over = self._is_abandoned or not self._thread.is_alive()
        return is_over and self._reporter.records.empty()

    def ask_to_stop(self) -> None:
        """Make it stop where it next reports."""
        self._reporter.ask_to_stop()

    def kill(self) -> None:
        """Wait for it no longer; a thread cannot be ended from outside."""
        self._reporter.ask_to_stop()
        self._is_abandoned = True

    def result(self) -> T:
        """What the function returned.

        Raises:
            Exception: whatever the function raised.
        """
        if self._error is not None:
            raise self._error
        if not self._result:
            raise WorkStopped
        return self._result[0]

    def _work(self) -> None:
        try:
            self._result.append(self._run(self._reporter))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error
