"""The story of a job: events are appended, never changed, and read on from any point."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.db.connection import database_now
from api.db.tables.jobs import JobEvent

__all__ = ["insert_event", "list_events", "storable"]

NUL = "\x00"
"""The one character that PostgreSQL keeps in no text; a model's file names may well have it."""
REPLACEMENT = "\ufffd"


def insert_event(
    session: Session, job_id: str, attempt: int, kind: str, data: Mapping[str, Any]
) -> int:
    """Add an event in a transaction that has already changed, and so locked, the job.

    The lock gives the ids of one job the order of their commits: a client that reads on from the
    last id it saw misses nothing.
    """
    event = JobEvent(
        job_id=job_id,
        attempt=attempt,
        type=kind,
        data=storable(data),
        created_at=database_now(session),
    )
    session.add(event)
    session.flush()
    return event.id


def list_events(
    session: Session, job_id: str, after_id: int = 0, limit: int = 1000
) -> Sequence[JobEvent]:
    """Read a job's events behind an id, oldest first."""
    query = (
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.id > after_id)
        .order_by(JobEvent.id)
        .limit(limit)
    )
    return session.scalars(query).all()


def storable(data: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what an engine reported, with a replacement for what no database column holds."""
    return {key.replace(NUL, REPLACEMENT): _storable_value(data[key]) for key in data}


def _storable_value(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(NUL, REPLACEMENT)
    if isinstance(value, Mapping):
        return storable(value)
    if isinstance(value, list | tuple):
        return [_storable_value(each) for each in value]
    return value
