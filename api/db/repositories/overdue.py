"""Jobs that nobody looks after any more, and rows that nobody needs any more."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, delete, exists, or_, select
from sqlalchemy.orm import Session

from api.db.tables.jobs import IdempotencyKey, Job, JobStatus, OutboxMessage

__all__ = ["forget_expired_keys", "forget_sent_messages", "lock_abandoned", "lock_unnoticed"]

MAX_PAUSE = timedelta(minutes=15)
"""A busy worker takes no messages; waking it more often would only fill the broker."""


def lock_abandoned(session: Session, now: datetime, limit: int) -> Sequence[Job]:
    """Jobs whose worker let its lease expire."""
    query = (
        select(Job)
        .where(Job.status.in_((JobStatus.RUNNING, JobStatus.CANCELLING)), Job.lease_until < now)
        .order_by(Job.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.scalars(query).all()


def lock_unnoticed(
    session: Session, now: datetime, first_pause: timedelta, limit: int
) -> Sequence[Job]:
    """Queued jobs for which no worker was woken lately; the pause doubles with every message."""
    is_waiting = exists().where(OutboxMessage.job_id == Job.id, OutboxMessage.sent_at.is_(None))
    query = (
        select(Job)
        .where(Job.status == JobStatus.QUEUED, _was_quiet(now, first_pause), ~is_waiting)
        .order_by(Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.scalars(query).all()


def forget_expired_keys(session: Session, now: datetime) -> None:
    """Delete idempotency keys that no longer hold."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.expires_at < now))


def forget_sent_messages(session: Session, before: datetime) -> None:
    """Delete messages that the broker took before a moment."""
    session.execute(delete(OutboxMessage).where(OutboxMessage.sent_at < before))


def _was_quiet(now: datetime, first_pause: timedelta) -> ColumnElement[bool]:
    # one condition a pause: date arithmetic in SQL differs between the databases
    conditions: list[ColumnElement[bool]] = [Job.published_at.is_(None)]
    count, pause = 1, first_pause
    while pause < MAX_PAUSE:
        conditions.append(and_(Job.publish_count == count, Job.published_at < now - pause))
        count, pause = count + 1, pause * 2
    conditions.append(and_(Job.publish_count >= count, Job.published_at < now - MAX_PAUSE))
    return or_(*conditions)
