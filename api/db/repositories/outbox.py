"""Wake-ups for workers: written with the job, sent to the broker after the commit."""

from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.db.connection import database_now
from api.db.tables.jobs import Job, JobStatus, OutboxMessage

__all__ = ["TaskName", "list_unsent", "mark_sent", "put_wakeup"]


class TaskName(StrEnum):
    """The tasks of a worker, by the name in the message."""

    RUN_JOB = "worker.tasks.run_job"
    """Claim and run jobs until none is claimable; its argument, a job id, is only a hint."""


def put_wakeup(session: Session, job_id: str) -> None:
    """Have a worker woken for a job once this transaction has committed."""
    session.add(
        OutboxMessage(
            task=TaskName.RUN_JOB, job_id=job_id, created_at=database_now(session), sent_at=None
        )
    )


def list_unsent(session: Session, limit: int) -> Sequence[OutboxMessage]:
    """The oldest messages that no broker has taken yet."""
    query = (
        select(OutboxMessage)
        .where(OutboxMessage.sent_at.is_(None))
        .order_by(OutboxMessage.id)
        .limit(limit)
    )
    return session.scalars(query).all()


def mark_sent(session: Session, messages: Sequence[OutboxMessage]) -> None:
    """Note that the broker has taken these messages, and count it on their queued jobs."""
    now = database_now(session)
    session.execute(
        update(OutboxMessage)
        .where(OutboxMessage.id.in_([message.id for message in messages]))
        .values(sent_at=now)
    )
    session.execute(
        update(Job)
        .where(Job.id.in_({message.job_id for message in messages}), Job.status == JobStatus.QUEUED)
        .values(published_at=now, publish_count=Job.publish_count + 1)
    )
