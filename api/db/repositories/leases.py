"""The worker's side of a job: claim it, keep its lease, report on it, end it.

Every write is fenced: it holds only while the worker still has the lease of its own attempt.
A worker that was believed dead and comes back can therefore change nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar

from sqlalchemy import Select, and_, func, or_, select, update
from sqlalchemy.orm import Session

from api.db.connection import database_now
from api.db.repositories.events import storable
from api.db.repositories.observations import fold_event
from api.db.repositories.transitions import (
    end_attempt,
    mark_cancelled,
    mark_failed,
    mark_queued_again,
    mark_running,
    mark_succeeded,
    record_change,
)
from api.db.tables.access import Tenant
from api.db.tables.artifacts import Artifact, ArtifactFile
from api.db.tables.jobs import Job, JobStatus
from api.errors import ServiceError

__all__ = [
    "ClaimedJob",
    "Lease",
    "LeaseLost",
    "cancel_job_finished",
    "claim_job",
    "complete_job",
    "fail_job",
    "record_event",
    "release_job",
    "renew_lease",
]

HELD = (JobStatus.RUNNING, JobStatus.CANCELLING)


class LeaseLost(ServiceError):
    """The worker no longer holds the lease of this attempt."""

    code: ClassVar[str] = "lease_lost"
    status: ClassVar[int] = 409


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one worker to run one attempt of a job."""

    job_id: str
    worker: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job and the lease to run it."""

    lease: Lease
    job: Job


def claim_job(
    session: Session, *, worker: str, lease_s: float, free_vram_bytes: int | None
) -> ClaimedJob | None:
    """Take the job that is due next, or None where none fits.

    Higher priority comes first, then the tenant with fewer running jobs, then the tenant that
    was served longest ago, then the older job. With one worker nothing runs when it claims: the
    running jobs alone would let one tenant's queue hold up all others.

    Args:
        session: a write transaction.
        worker: a name that no other live worker has.
        lease_s: seconds until others may take the job, unless the lease is renewed.
        free_vram_bytes: GPU memory there is; None takes jobs of any size.
    """
    now = database_now(session)
    job = session.scalar(_due_next(now, free_vram_bytes))
    if job is None:
        return None
    if job.status == JobStatus.RUNNING:
        end_attempt(session, job, "worker_lost")
    mark_running(session, job, worker, now + timedelta(seconds=lease_s))
    session.execute(update(Tenant).where(Tenant.id == job.tenant_id).values(last_served_at=now))
    return ClaimedJob(lease=Lease(job_id=job.id, worker=worker, attempt=job.attempt), job=job)


def renew_lease(session: Session, lease: Lease, lease_s: float) -> bool:
    """Keep the lease for another `lease_s` seconds; True when the job is to be cancelled.

    Raises:
        LeaseLost: another worker or the reaper has the job.
    """
    job = _lock_held(session, lease)
    job.lease_until = database_now(session) + timedelta(seconds=lease_s)
    return job.status == JobStatus.CANCELLING


def record_event(session: Session, lease: Lease, kind: str, data: Mapping[str, Any]) -> int:
    """Append an event and bring the job's stage, progress and layers up to date; returns its id.

    Raises:
        LeaseLost: another worker or the reaper has the job.
    """
    job, clean = _lock_held(session, lease), storable(data)
    fold_event(session, job, kind, clean)
    return record_change(session, job, kind, clean)


def complete_job(
    session: Session,
    lease: Lease,
    *,
    report: Mapping[str, Any],
    artifact: Artifact,
    files: Sequence[ArtifactFile],
) -> None:
    """End the job with its artifact. A cancel that comes this late has lost: the work is done.

    Raises:
        LeaseLost: another worker or the reaper has the job.
    """
    job = _lock_held(session, lease)
    session.add(artifact)
    session.flush()
    session.add_all(files)
    end_attempt(session, job, JobStatus.SUCCEEDED)
    mark_succeeded(session, job, artifact.id, report)


def fail_job(session: Session, lease: Lease, *, error: Mapping[str, Any], retry: bool) -> JobStatus:
    """End the attempt with an error, and the job with it unless another attempt may help.

    A job that was to be cancelled is cancelled, whatever its process died of.

    Args:
        session: a write transaction.
        lease: of the attempt that failed.
        error: `code`, `message`, and the `layer` it happened in or None.
        retry: whether the same might work next time.

    Returns:
        The job's new status: queued, failed or cancelled.

    Raises:
        LeaseLost: another worker or the reaper has the job.
    """
    job = _lock_held(session, lease)
    end_attempt(session, job, str(error["code"]))
    if job.status == JobStatus.CANCELLING:
        mark_cancelled(session, job)
    elif retry and job.attempt < job.max_attempts:
        mark_queued_again(session, job, {"error": dict(error)})
    else:
        mark_failed(session, job, error)
    return job.status


def cancel_job_finished(session: Session, lease: Lease) -> None:
    """End the job as cancelled, once nothing of it runs any more.

    Raises:
        LeaseLost: another worker or the reaper has the job.
    """
    job = _lock_held(session, lease)
    end_attempt(session, job, JobStatus.CANCELLED)
    mark_cancelled(session, job)


def release_job(session: Session, lease: Lease) -> None:
    """Give the job back because the worker shuts down; the attempt does not count.

    Raises:
        LeaseLost: another worker or the reaper has the job.
    """
    job = _lock_held(session, lease)
    end_attempt(session, job, "released")
    if job.status == JobStatus.CANCELLING:
        mark_cancelled(session, job)
        return
    # attempt numbers fence writes and are never used twice, so the budget grows instead
    job.max_attempts += 1
    mark_queued_again(session, job, {"reason": "worker_shutdown"})


def _due_next(now: datetime, free_vram_bytes: int | None) -> Select[Job]:
    load = (
        select(Job.tenant_id, func.count().label("running"))
        .where(Job.status.in_(HELD), Job.lease_until >= now)
        .group_by(Job.tenant_id)
        .subquery()
    )
    is_free = or_(
        Job.status == JobStatus.QUEUED,
        and_(Job.status == JobStatus.RUNNING, Job.lease_until < now),
    )
    query = (
        select(Job)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .outerjoin(load, load.c.tenant_id == Job.tenant_id)
        .where(is_free, Job.attempt < Job.max_attempts)
        .order_by(
            Job.priority.desc(),
            func.coalesce(load.c.running, 0),
            Tenant.last_served_at.asc().nulls_first(),
            Job.created_at,
            Job.id,
        )
        .limit(1)
        # SQLite knows no row locks; there the write transaction holds out all others
        .with_for_update(of=Job, skip_locked=True)
    )
    return query if free_vram_bytes is None else query.where(Job.need_vram_bytes <= free_vram_bytes)


def _lock_held(session: Session, lease: Lease) -> Job:
    job = session.scalar(
        select(Job)
        .where(
            Job.id == lease.job_id,
            Job.lease_owner == lease.worker,
            Job.attempt == lease.attempt,
            Job.status.in_(HELD),
        )
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if job is None:
        raise LeaseLost
    return job
