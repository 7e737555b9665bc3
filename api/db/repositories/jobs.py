"""Jobs as their tenants see them: insert, read, list and count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from api.db.repositories.events import insert_event
from api.db.repositories.pages import Cursor, Page, read_page
from api.db.tables.access import Tenant
from api.db.tables.jobs import TERMINAL, Job, JobLayer, JobStatus
from api.errors import InvalidRequest, JobNotFound

__all__ = [
    "JobFilter",
    "count_active",
    "count_by_status",
    "get_job",
    "insert_job",
    "list_jobs",
    "list_layers",
    "lock_job",
    "lock_tenant",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs a list holds; what is None matches every job."""

    status: JobStatus | None = None
    model: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def insert_job(session: Session, job: Job) -> None:
    """Add a queued job and the first event of its story."""
    session.add(job)
    session.flush()
    insert_event(session, job.id, 0, "job.queued", {})
    # columns that the caller left out are then known after the session has closed, too
    session.refresh(job)


def get_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """Read a tenant's job.

    Raises:
        JobNotFound: there is none, or it is another tenant's.
    """
    job = session.get(Job, job_id)
    if job is None or job.tenant_id != tenant_id:
        raise JobNotFound
    return job


def lock_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """Read a tenant's job and keep workers and other requests from changing it.

    Raises:
        JobNotFound: there is none, or it is another tenant's.
    """
    query = select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id).with_for_update()
    job = session.scalar(query)
    if job is None:
        raise JobNotFound
    return job


def lock_tenant(session: Session, tenant_id: str) -> None:
    """Let a tenant's creates happen one after the other, so that counts stay true."""
    # the weak lock: it waits for itself, not for the rows that refer to the tenant
    session.scalar(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))


def list_jobs(
    session: Session, tenant_id: str, wanted: JobFilter | None = None, cursor: Cursor | None = None
) -> Page[Job]:
    """Read one page of a tenant's jobs, newest first.

    Raises:
        InvalidRequest: the cursor is not valid.
    """
    wanted = wanted or JobFilter()
    query = select(Job)
    if wanted.status is not None:
        query = query.where(Job.status == wanted.status)
    if wanted.model is not None:
        query = query.where(Job.model == wanted.model)
    for key, value in wanted.labels.items():
        query = query.where(_has_label(key, value))
    return read_page(session, Job, query, tenant_id, cursor or Cursor())


def count_active(session: Session, tenant_id: str) -> int:
    """Count a tenant's jobs that are not at an end."""
    return count_in(session, Job.tenant_id == tenant_id, Job.status.not_in(TERMINAL))


def count_in(session: Session, *conditions: ColumnElement[bool]) -> int:
    """Count jobs for which all conditions hold."""
    return session.scalar(select(func.count()).select_from(Job).where(*conditions)) or 0


def count_by_status(session: Session) -> dict[JobStatus, int]:
    """Count the jobs of all tenants in every status; statuses without jobs are 0."""
    rows = session.execute(select(Job.status, func.count()).group_by(Job.status))
    counts = {JobStatus(status): count for status, count in rows}
    return {status: counts.get(status, 0) for status in JobStatus}


def list_layers(session: Session, job_id: str) -> Sequence[JobLayer]:
    """Read the latest result of every layer, in the order of the model."""
    query = select(JobLayer).where(JobLayer.job_id == job_id).order_by(JobLayer.index)
    return session.scalars(query).all()


def _has_label(key: str, value: str) -> ColumnElement[bool]:
    if '"' in key or "\\" in key:
        raise InvalidRequest(f"label {key!r} has a quote or a backslash", param=f"label.{key}")
    matches: ColumnElement[bool] = Job.labels[key].as_string() == value
    return matches
