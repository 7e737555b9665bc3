"""Keeping a claimed job alive while its work runs: lease, events, cancellation, grace.

Whatever runs, the lease is renewed from here and every event is written from here, so that one
thread alone holds the job. When the lease is lost the work is killed and nothing more is written.
"""

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from api.db.connection import Database
from api.db.repositories.leases import Lease, LeaseLost, record_event, renew_lease
from api.settings import WorkerSettings
from api.telemetry import get_logger
from worker.lifeline import Lifeline

__all__ = ["StopReason", "Stopped", "Watch", "Work"]

log = get_logger(__name__)

T = TypeVar("T")

TICK_S = 0.1
PROGRESS_INTERVAL_S = 0.5
PROGRESS_TYPES = frozenset({"progress", "download.progress"})
RETRY_INTERVAL_S = 0.5
# what a restarting database looks like; the lease says how long it may last
UNREACHABLE = (OperationalError, InterfaceError)


class StopReason(StrEnum):
    """Why work was stopped that had not ended by itself."""

    CANCELLED = "cancelled"
    """The job's owner asked for it."""
    SHUTDOWN = "shutdown"
    """The worker stops; another one goes on with the job."""


class Stopped(Exception):
    """The job's work was stopped on purpose."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Work(Protocol):
    """Something that runs beside the supervisor: a `ChildProcess` or `BackgroundWork`."""

    def take(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call; waits at most `timeout_s` for the first."""

    @property
    def is_done(self) -> bool:
        """True when it is over and its events were taken."""

    def ask_to_stop(self) -> None:
        """Make it stop at its next step."""

    def kill(self) -> None:
        """End it now."""


class Watch:
    """Holds one lease."""

    def __init__(
        self, database: Database, lease: Lease, settings: WorkerSettings, lifeline: Lifeline
    ) -> None:
        self._database = database
        self._lease = lease
        self._settings = settings
        self._lifeline = lifeline
        self._is_cancelled = False
        self._pending: list[dict[str, Any]] = []
        self._held_back: dict[str, dict[str, Any]] = {}
        self._progress_at: dict[str, float] = {}
        self._renewed_at = time.monotonic()
        self._beat_at = 0.0

    def follow(self, work: Work) -> None:
        """Stay with a piece of work until it is over.

        Raises:
            Stopped: it was stopped on purpose; it is over.
            LeaseLost: the job is no longer this worker's; the work was killed.
        """
        reason: StopReason | None = None
        kill_at = float("inf")
        try:
            while not work.is_done:
                self.record(*work.take(TICK_S))
                self._beat_when_due()
                if reason is None and (reason := self._stop_reason()):
                    log.info("work_asked_to_stop", reason=reason)
                    work.ask_to_stop()
                    kill_at = time.monotonic() + self._settings.grace_s
                if time.monotonic() >= kill_at:
                    log.warning("work_killed_after_grace", grace_s=self._settings.grace_s)
                    work.kill()
                    kill_at = float("inf")
        except BaseException:
            # without a watch nothing may go on computing
            work.kill()
            raise
        self._release_progress()
        # a cancellation counts to the last; work that ended before a shutdown reached it is kept
        if self._is_cancelled:
            raise Stopped(StopReason.CANCELLED)
        if reason is not None:
            raise Stopped(reason)

    def record(self, *events: dict[str, Any]) -> None:
        """Write events with their `type`; of progress only the latest twice a second.

        Raises:
            LeaseLost: the job is no longer this worker's.
        """
        for event in events:
            if event["type"] not in PROGRESS_TYPES:
                self._pending.extend(self._held_back.values())
                self._held_back.clear()
                self._pending.append(event)
            else:
                self._held_back[event["type"]] = event
        self._pending.extend(self._due_progress())
        self._flush()

    def settle(self, write: Callable[[Session, Lease], T]) -> T:
        """Write the job's end in one transaction; outlives a restart of the database.

        Raises:
            LeaseLost: the job is no longer this worker's, or the database stayed away too long.
        """
        self._release_progress()
        while True:
            try:
                with self._database.write() as session:
                    self._write(session, self._pending)
                    return write(session, self._lease)
            except UNREACHABLE as error:
                self._note_unreachable(error)
                time.sleep(RETRY_INTERVAL_S)

    def _due_progress(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        due = [
            event
            for name, event in self._held_back.items()
            if now - self._progress_at.get(name, float("-inf")) >= PROGRESS_INTERVAL_S
        ]
        for event in due:
            self._progress_at[event["type"]] = now
            del self._held_back[event["type"]]
        return due

    def _release_progress(self) -> None:
        self._pending.extend(self._held_back.values())
        self._held_back.clear()
        self._flush()

    def _flush(self) -> None:
        # an event that cannot be written raises, once; only those of a lost connection wait
        events, self._pending = self._pending, []
        if events and not self._attempt(lambda session: self._write(session, events)):
            self._pending = events

    def _beat_when_due(self) -> None:
        if time.monotonic() >= self._beat_at:
            self._attempt(self._beat)
            self._beat_at = time.monotonic() + self._settings.heartbeat_s

    def _beat(self, session: Session) -> None:
        started = time.monotonic()
        self._is_cancelled = renew_lease(session, self._lease, self._settings.lease_s)
        self._renewed_at = started

    def _write(self, session: Session, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            data = {name: value for name, value in event.items() if name != "type"}
            record_event(session, self._lease, event["type"], data)

    def _attempt(self, write: Callable[[Session], None]) -> bool:
        try:
            with self._database.write() as session:
                write(session)
        except UNREACHABLE as error:
            self._note_unreachable(error)
            return False
        return True

    def _note_unreachable(self, error: Exception) -> None:
        if time.monotonic() - self._renewed_at > self._settings.lease_s:
            raise LeaseLost from error
        log.warning("database_unreachable", error=type(error).__name__)

    def _stop_reason(self) -> StopReason | None:
        if self._is_cancelled:
            return StopReason.CANCELLED
        return StopReason.SHUTDOWN if self._lifeline.is_cut() else None
