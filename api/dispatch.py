"""What keeps jobs moving when processes die: the relay sends wake-ups, the reaper finds the lost.

Both may run in every API process at once. Each is safe to repeat: a wake-up too many finds
nothing to claim, and a job that was put back is not put back again.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ClassVar

from celery import Celery
from kombu.exceptions import ChannelError, KombuError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.db.connection import Database, database_now
from api.db.repositories.outbox import list_unsent, mark_sent, put_wakeup
from api.db.repositories.overdue import (
    forget_expired_keys,
    forget_sent_messages,
    lock_abandoned,
    lock_unnoticed,
)
from api.db.repositories.transitions import (
    end_attempt,
    mark_cancelled,
    mark_failed,
    mark_queued_again,
)
from api.db.tables.jobs import Job, JobStatus, OutboxMessage
from api.errors import ServiceError
from api.settings import Settings
from api.telemetry import get_logger

__all__ = ["BrokerUnreachable", "Dispatcher", "reap_jobs", "relay_outbox"]

log = get_logger(__name__)

BATCH = 100
DISPATCH_LOCK = 0x6162_7102
"""Number of the advisory lock that leaves the work to one process at a time."""
KEEP_SENT = timedelta(days=1)
MAX_PAUSE_S = 15.0
"""Between two tries to reach a broker or a database that does not answer."""
STOP_S = 10.0
WORKER_LOST = {
    "code": "worker_lost",
    "message": "The worker stopped reporting, on every attempt there was.",
    "layer": None,
}


class BrokerUnreachable(ServiceError):
    """The broker does not take messages; they wait in the database."""

    code: ClassVar[str] = "broker_unreachable"
    status: ClassVar[int] = 503


def relay_outbox(database: Database, celery: Celery) -> int:
    """Send the oldest wake-ups that no broker has taken; returns how many it took.

    What was sent but not noted, because this process died in between, is sent twice.

    Raises:
        BrokerUnreachable: the rest stays where it is, for the next call.
    """
    with database.read() as session:
        waiting = list_unsent(session, BATCH)
    sent: list[OutboxMessage] = []
    try:
        for message in waiting:
            celery.send_task(message.task, args=[message.job_id])
            sent.append(message)
    except (KombuError, ChannelError, OSError) as error:
        raise BrokerUnreachable(str(error)) from error
    finally:
        if sent:
            with database.write() as session:
                mark_sent(session, sent)
    return len(sent)


def reap_jobs(database: Database, settings: Settings) -> int:
    """Put jobs of dead workers back, end those that cannot go on, wake workers once more.

    Returns:
        How many jobs were changed or announced again.
    """
    with database.write() as session:
        now = database_now(session)
        abandoned = lock_abandoned(session, now, BATCH)
        for job in abandoned:
            _take_from_worker(session, job)
        first_pause = timedelta(seconds=settings.queue.republish_after_s)
        unnoticed = lock_unnoticed(session, now, first_pause, BATCH)
        for job in unnoticed:
            put_wakeup(session, job.id)
        forget_expired_keys(session, now)
        forget_sent_messages(session, now - KEEP_SENT)
        return len(abandoned) + len(unnoticed)


class Dispatcher:
    """Runs relay and reaper in a thread until it is stopped."""

    def __init__(self, database: Database, celery: Celery, settings: Settings) -> None:
        self._database = database
        self._celery = celery
        self._settings = settings
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._reaped_at: float | None = None

    def start(self) -> None:
        """Begin; the first round reaps, too: workers may have died with the last API process."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the round that is under way and end."""
        self._is_stopping.set()
        # a broker that hangs must not keep the process from ending
        self._thread.join(STOP_S)

    def _run(self) -> None:
        pause_s = self._settings.queue.relay_interval_s
        while not self._is_stopping.wait(pause_s):
            pause_s = min(pause_s * 2, MAX_PAUSE_S)
            try:
                with _alone(self._database) as is_alone:
                    if is_alone:
                        self._dispatch()
                pause_s = self._settings.queue.relay_interval_s
            except BrokerUnreachable as error:
                log.warning("broker_unreachable", error=error.message)
            except Exception:
                # the outermost loop: a database that restarts must not end the relay for good
                log.exception("dispatch_failed")

    def _dispatch(self) -> None:
        if self._is_reap_due():
            reaped = reap_jobs(self._database, self._settings)
            if reaped:
                log.info("jobs_reaped", jobs=reaped)
            self._reaped_at = time.monotonic()
        while relay_outbox(self._database, self._celery) == BATCH:
            if self._is_stopping.is_set():
                return

    def _is_reap_due(self) -> bool:
        if self._reaped_at is None:
            return True
        return time.monotonic() - self._reaped_at >= self._settings.queue.reap_interval_s


def _take_from_worker(session: Session, job: Job) -> None:
    end_attempt(session, job, "worker_lost")
    if job.status == JobStatus.CANCELLING:
        mark_cancelled(session, job)
    elif job.attempt < job.max_attempts:
        mark_queued_again(session, job, {"reason": "worker_lost"})
    else:
        mark_failed(session, job, WORKER_LOST)
    log.info("job_abandoned", job_id=job.id, attempt=job.attempt, status=job.status)


@contextmanager
def _alone(database: Database) -> Iterator[bool]:
    """Whether no other process dispatches; none can begin to before the block ends."""
    if database.engine.dialect.name != "postgresql":
        # one machine, one API process; and every write transaction is alone
        yield True
        return
    with database.read() as session:
        # held by the transaction: it cannot outlive a process that dies
        yield bool(session.scalar(select(func.pg_try_advisory_xact_lock(DISPATCH_LOCK))))
