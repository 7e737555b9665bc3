"""Idempotency keys: which job an earlier, equal request has created."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from api.db.connection import database_now
from api.db.tables.jobs import IdempotencyKey, Job
from api.errors import IdempotencyMismatch

__all__ = ["RequestKey", "find_replayed", "insert_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKey:
    """An Idempotency-Key, where it holds, and the hash of the body it came with."""

    key: str
    method: str
    path: str
    body_sha256: str


def find_replayed(session: Session, tenant_id: str, request: RequestKey) -> Job | None:
    """The job that an equal request has created; None when the key is new or has expired.

    Raises:
        IdempotencyMismatch: the key came with another body before.
    """
    stored = session.scalar(_stored(tenant_id, request))
    if stored is None or stored.expires_at <= database_now(session):
        return None
    if stored.body_sha256 != request.body_sha256:
        raise IdempotencyMismatch(param="Idempotency-Key")
    return session.get_one(Job, stored.job_id)


def insert_key(
    session: Session, tenant_id: str, request: RequestKey, job_id: str, expires_at: datetime
) -> None:
    """Remember the job that a request created, in place of what expired."""
    stored = session.scalar(_stored(tenant_id, request))
    if stored is None:
        stored = IdempotencyKey(
            tenant_id=tenant_id, key=request.key, method=request.method, path=request.path
        )
        session.add(stored)
    stored.body_sha256 = request.body_sha256
    stored.job_id = job_id
    stored.expires_at = expires_at


def _stored(tenant_id: str, request: RequestKey) -> Select[IdempotencyKey]:
    return select(IdempotencyKey).where(
        IdempotencyKey.tenant_id == tenant_id,
        IdempotencyKey.key == request.key,
        IdempotencyKey.method == request.method,
        IdempotencyKey.path == request.path,
    )
