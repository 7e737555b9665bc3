"""The state machine of a job: every change of its status, with the event that tells of it.

    queued -> running -> succeeded | failed
    queued -> cancelled;  running -> cancelling -> cancelled
    running -> queued                  a lost worker or an error that another attempt may mend
    failed, cancelled -> queued        a retry

Every function takes a job that this transaction has locked or inserted.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from api.db.connection import database_now
from api.db.repositories.events import insert_event, storable
from api.db.repositories.outbox import put_wakeup
from api.db.tables.jobs import Job, JobAttempt, JobStatus

__all__ = [
    "ask_to_stop",
    "end_attempt",
    "mark_cancelled",
    "mark_failed",
    "mark_queued_again",
    "mark_running",
    "mark_succeeded",
    "record_change",
]


def mark_running(session: Session, job: Job, worker: str, lease_until: datetime) -> None:
    """Begin the job's next attempt."""
    now = database_now(session)
    job.status = JobStatus.RUNNING
    job.stage = None
    job.progress = None
    job.attempt += 1
    job.lease_owner = worker
    job.lease_until = lease_until
    job.started_at = now
    session.add(
        JobAttempt(
            job_id=job.id,
            attempt=job.attempt,
            worker=worker,
            started_at=now,
            ended_at=None,
            outcome=None,
        )
    )
    record_change(session, job, "job.started", {"attempt": job.attempt, "worker": worker})


def mark_queued_again(session: Session, job: Job, data: Mapping[str, Any]) -> None:
    """Put the job back in the queue and have a worker woken for it."""
    job.status = JobStatus.QUEUED
    job.cancel_requested_at = job.failed_at = job.cancelled_at = None
    job.error = None
    job.published_at = None
    job.publish_count = 0
    _leave_worker(job)
    put_wakeup(session, job.id)
    record_change(session, job, "job.requeued", data)


def ask_to_stop(session: Session, job: Job) -> None:
    """Tell the worker of a running job to cancel it."""
    job.status = JobStatus.CANCELLING
    job.cancel_requested_at = database_now(session)
    record_change(session, job, "job.cancelling", {})


def mark_cancelled(session: Session, job: Job) -> None:
    """End the job as cancelled; nothing of it runs any more."""
    job.status = JobStatus.CANCELLED
    job.cancelled_at = database_now(session)
    job.cancel_requested_at = job.cancel_requested_at or job.cancelled_at
    _leave_worker(job)
    record_change(session, job, "job.cancelled", {})


def mark_failed(session: Session, job: Job, error: Mapping[str, Any]) -> None:
    """End the job with an error."""
    job.status = JobStatus.FAILED
    job.failed_at = database_now(session)
    job.error = storable(error)
    # the stage stays: it says where the job failed
    job.lease_owner = job.lease_until = None
    record_change(session, job, "job.failed", {"error": dict(error)})


def mark_succeeded(session: Session, job: Job, artifact_id: str, report: Mapping[str, Any]) -> None:
    """End the job with its artifact."""
    job.status = JobStatus.SUCCEEDED
    job.succeeded_at = database_now(session)
    job.artifact_id = artifact_id
    job.report = storable(report)
    _leave_worker(job)
    record_change(session, job, "job.succeeded", {"artifact_id": artifact_id})


def end_attempt(session: Session, job: Job, outcome: str) -> None:
    """Close the running attempt with how it ended."""
    attempt = session.get_one(JobAttempt, (job.id, job.attempt))
    attempt.ended_at = database_now(session)
    attempt.outcome = outcome


def record_change(session: Session, job: Job, kind: str, data: Mapping[str, Any]) -> int:
    """Save what was changed on the job as its next version, with an event; returns its id."""
    job.version += 1
    session.flush()
    return insert_event(session, job.id, job.attempt, kind, data)


def _leave_worker(job: Job) -> None:
    job.lease_owner = job.lease_until = None
    job.stage = None
    job.progress = None
