"""Tables of the job: its state, attempts, events, layers, and the messages that wake a worker."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from api.db.base import Base

__all__ = [
    "TERMINAL",
    "IdempotencyKey",
    "Job",
    "JobAttempt",
    "JobEvent",
    "JobLayer",
    "JobStatus",
    "OutboxMessage",
]

# SQLite counts up only an INTEGER key
BigKey = BigInteger().with_variant(Integer(), "sqlite")


class JobStatus(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    """Waits for a worker."""
    RUNNING = "running"
    """A worker holds its lease."""
    CANCELLING = "cancelling"
    """A worker holds its lease and was asked to stop."""
    CANCELLED = "cancelled"
    """Stopped on request; its layer checkpoints stay."""
    SUCCEEDED = "succeeded"
    """Its artifact is complete."""
    FAILED = "failed"
    """Ended with an error; a retry goes on from its layer checkpoints."""


TERMINAL = frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED, JobStatus.FAILED})
_STATUSES = ", ".join(f"'{status}'" for status in JobStatus)


class Job(Base):
    """One quantization asked for by a tenant."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN ({_STATUSES})", name="status"),
        Index("ix_jobs_tenant_created", "tenant_id", "created_at", "id"),
        Index("ix_jobs_claim", "status", "priority", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    status: Mapped[JobStatus] = mapped_column(String(16))
    stage: Mapped[str | None] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(String(200))
    """As requested: `owner/name` or `local:<root>/<folder>`."""
    revision: Mapped[str | None] = mapped_column(String(100))
    """As requested."""
    source_sha: Mapped[str] = mapped_column(String(64))
    """The revision that the request resolved to; the job never reads another."""
    spec: Mapped[dict[str, Any]]
    evaluation: Mapped[dict[str, Any]]
    publish: Mapped[dict[str, Any] | None]
    labels: Mapped[dict[str, Any]]
    estimate: Mapped[dict[str, Any]]
    """What preflight promised: parameters, bytes, bits per weight, disk, memory."""
    need_vram_bytes: Mapped[int] = mapped_column(BigInteger)
    priority: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int]
    lease_owner: Mapped[str | None] = mapped_column(String(100))
    lease_until: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    published_at: Mapped[datetime | None]
    """When a worker was last woken for it."""
    publish_count: Mapped[int] = mapped_column(default=0)
    progress: Mapped[dict[str, Any] | None]
    """`{"done", "total", "unit"}` of the current stage."""
    report: Mapped[dict[str, Any] | None]
    """What the engine measured."""
    error: Mapped[dict[str, Any] | None]
    """`{"code", "message", "layer"}` of a failed job."""
    artifact_id: Mapped[str | None] = mapped_column(String(40))
    retry_of: Mapped[str | None] = mapped_column(String(40))
    version: Mapped[int] = mapped_column(default=1)
    """Grows with every change; the job's ETag."""
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]
    succeeded_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]


class JobAttempt(Base):
    """One claim of a job by a worker, and how it ended."""

    __tablename__ = "job_attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str] = mapped_column(String(100))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(40))
    """`succeeded`, `cancelled`, `requeued`, or an error code."""


class JobEvent(Base):
    """Something that happened to a job; never changed, its id is the id of the SSE event."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job", "job_id", "id"),)

    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class JobLayer(Base):
    """The latest result of one decoder layer of a job."""

    __tablename__ = "job_layers"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    bits: Mapped[dict[str, Any]]
    loss_before: Mapped[float | None]
    loss_after: Mapped[float | None]
    seconds: Mapped[float | None]
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    resumed: Mapped[bool] = mapped_column(default=False)


class IdempotencyKey(Base):
    """The stored answer to a create request, written in the job's transaction."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        UniqueConstraint("tenant_id", "key", "method", "path", name="uq_idempotency_keys_request"),
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key: Mapped[str] = mapped_column(String(255))
    method: Mapped[str] = mapped_column(String(8))
    path: Mapped[str] = mapped_column(String(200))
    body_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    expires_at: Mapped[datetime]


class OutboxMessage(Base):
    """A wake-up that must reach the broker once its transaction has committed."""

    __tablename__ = "outbox"
    __table_args__ = (
        Index(
            "ix_outbox_unsent",
            "id",
            sqlite_where=text("sent_at IS NULL"),
            postgresql_where=text("sent_at IS NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    task: Mapped[str] = mapped_column(String(100))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime]
    sent_at: Mapped[datetime | None]
