"""What a tenant does with jobs: create, read, cancel and retry. Each is one transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from api.db.base import new_id
from api.db.connection import Database, database_now
from api.db.repositories import idempotency, jobs
from api.db.repositories.idempotency import RequestKey
from api.db.repositories.jobs import JobFilter
from api.db.repositories.pages import Cursor, Page
from api.db.repositories.transitions import ask_to_stop, mark_cancelled, mark_queued_again
from api.db.tables.jobs import Job, JobLayer, JobStatus
from api.errors import JobStateConflict, QuotaExceeded
from api.queue import submit_job
from api.settings import Settings

__all__ = [
    "NewJob",
    "cancel_job",
    "create_job",
    "find_replayed_job",
    "get_job",
    "list_jobs",
    "list_layers",
    "retry_job",
]

QUOTA_RETRY_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A quantization that passed its preflight."""

    model: str
    revision: str | None
    source_sha: str
    spec: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    publish: Mapping[str, Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    estimate: Mapping[str, Any] = field(default_factory=dict)
    need_vram_bytes: int = 0
    priority: int = 0


def create_job(
    database: Database,
    settings: Settings,
    tenant_id: str,
    wanted: NewJob,
    request: RequestKey | None = None,
) -> Job:
    """Queue a job: its row, first event, wake-up and idempotency key are one transaction.

    Args:
        database: where the job lives.
        settings: limits and attempt budget.
        tenant_id: the owner.
        wanted: what to do.
        request: the Idempotency-Key of the request, if it has one.

    Returns:
        The new job, or the one that an equal request with this key has created.

    Raises:
        IdempotencyMismatch: the key came with another body before.
        QuotaExceeded: the tenant has too many jobs that are not at an end.
    """
    with database.write() as session:
        # from here on no other create of this tenant can come between check and insert
        jobs.lock_tenant(session, tenant_id)
        replayed = idempotency.find_replayed(session, tenant_id, request) if request else None
        if replayed is not None:
            return replayed
        _check_quota(session, settings, tenant_id)
        job = _new_row(session, settings, tenant_id, wanted)
        jobs.insert_job(session, job)
        submit_job(session, job.id)
        if request is not None:
            lifetime = timedelta(hours=settings.limits.idempotency_hours)
            idempotency.insert_key(session, tenant_id, request, job.id, job.created_at + lifetime)
        return job


def find_replayed_job(database: Database, tenant_id: str, request: RequestKey) -> Job | None:
    """The job that an equal request has created, so that a replay needs no new preflight.

    Raises:
        IdempotencyMismatch: the key came with another body before.
    """
    with database.read() as session:
        return idempotency.find_replayed(session, tenant_id, request)


def get_job(database: Database, tenant_id: str, job_id: str) -> Job:
    """Read a tenant's job.

    Raises:
        JobNotFound: there is none, or it is another tenant's.
    """
    with database.read() as session:
        return jobs.get_job(session, tenant_id, job_id)


def list_jobs(database: Database, tenant_id: str, wanted: JobFilter, cursor: Cursor) -> Page[Job]:
    """Read one page of a tenant's jobs, newest first.

    Raises:
        InvalidRequest: the cursor is not valid.
    """
    with database.read() as session:
        return jobs.list_jobs(session, tenant_id, wanted, cursor)


def list_layers(database: Database, tenant_id: str, job_id: str) -> Sequence[JobLayer]:
    """Read the latest result of every layer of a tenant's job.

    Raises:
        JobNotFound: there is none, or it is another tenant's.
    """
    with database.read() as session:
        return jobs.list_layers(session, jobs.get_job(session, tenant_id, job_id).id)


def cancel_job(database: Database, tenant_id: str, job_id: str) -> Job:
    """Stop a job: at once while it is queued, else as soon as its worker has stopped.

    Asking again changes nothing.

    Raises:
        JobNotFound: there is none, or it is another tenant's.
        JobStateConflict: the job has succeeded or failed.
    """
    with database.write() as session:
        job = jobs.lock_job(session, tenant_id, job_id)
        match job.status:
            case JobStatus.QUEUED:
                mark_cancelled(session, job)
            case JobStatus.RUNNING:
                ask_to_stop(session, job)
            case JobStatus.CANCELLING | JobStatus.CANCELLED:
                pass
            case _:
                raise JobStateConflict(f"the quantization has already {job.status}")
        return job


def retry_job(database: Database, settings: Settings, tenant_id: str, job_id: str) -> Job:
    """Queue a failed or cancelled job again; it goes on from its layer checkpoints.

    Raises:
        JobNotFound: there is none, or it is another tenant's.
        JobStateConflict: the job has not failed and is not cancelled.
        QuotaExceeded: the tenant has too many jobs that are not at an end.
    """
    with database.write() as session:
        # first the job, then the tenant, as a worker that claims it does: never a deadlock
        job = jobs.lock_job(session, tenant_id, job_id)
        jobs.lock_tenant(session, tenant_id)
        if job.status not in {JobStatus.FAILED, JobStatus.CANCELLED}:
            raise JobStateConflict(
                f"the quantization is {job.status}; only a failed or cancelled one can be retried"
            )
        _check_quota(session, settings, tenant_id)
        job.max_attempts = job.attempt + settings.worker.max_attempts
        mark_queued_again(session, job, {"reason": "retry"})
        return job


def _check_quota(session: Session, settings: Settings, tenant_id: str) -> None:
    if jobs.count_active(session, tenant_id) >= settings.limits.active_jobs:
        raise QuotaExceeded(
            f"{settings.limits.active_jobs} quantizations are queued or running; "
            "wait for one to end or cancel one",
            retry_after_s=QUOTA_RETRY_S,
        )


def _new_row(session: Session, settings: Settings, tenant_id: str, wanted: NewJob) -> Job:
    return Job(
        id=new_id("job"),
        tenant_id=tenant_id,
        status=JobStatus.QUEUED,
        model=wanted.model,
        revision=wanted.revision,
        source_sha=wanted.source_sha,
        spec=dict(wanted.spec),
        evaluation=dict(wanted.evaluation),
        publish=dict(wanted.publish) if wanted.publish is not None else None,
        labels=dict(wanted.labels),
        estimate=dict(wanted.estimate),
        need_vram_bytes=wanted.need_vram_bytes,
        priority=wanted.priority,
        max_attempts=settings.worker.max_attempts,
        created_at=database_now(session),
    )
