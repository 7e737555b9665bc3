"""How far jobs have come, for those who watch many of them at once."""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.db.connection import database_now
from api.db.tables.jobs import Job, JobEvent, JobStatus

__all__ = ["JobPosition", "oldest_queued_age_s", "read_positions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPosition:
    """A job's status and last event at one moment."""

    status: JobStatus
    event_id: int
    """0 without events."""


def read_positions(session: Session, job_ids: Collection[str]) -> dict[str, JobPosition]:
    """Read where jobs are, by id; jobs that do not exist are left out."""
    latest = select(func.max(JobEvent.id)).where(JobEvent.job_id == Job.id).scalar_subquery()
    # one statement, so that a final status never comes without its event
    rows = session.execute(select(Job.id, Job.status, latest).where(Job.id.in_(job_ids)))
    return {
        job_id: JobPosition(status=JobStatus(status), event_id=event_id or 0)
        for job_id, status, event_id in rows
    }


def oldest_queued_age_s(session: Session) -> float:
    """How long the oldest queued job of all tenants has waited; 0 without one."""
    created_at = session.scalar(
        select(func.min(Job.created_at)).where(Job.status == JobStatus.QUEUED)
    )
    return (database_now(session) - created_at).total_seconds() if created_at else 0.0
