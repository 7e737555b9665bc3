"""Tenants and their API keys."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from api.db.base import new_id
from api.db.connection import database_now
from api.db.tables.access import ApiKey, Tenant
from api.errors import KeyNotFound

__all__ = [
    "count_keys",
    "find_key",
    "get_key",
    "get_or_create_tenant",
    "insert_key",
    "list_keys",
    "note_key_use",
    "revoke_key",
]


def get_or_create_tenant(session: Session, name: str) -> Tenant:
    """Read the tenant of a name; a write transaction creates it where there is none."""
    tenant = session.scalar(select(Tenant).where(Tenant.name == name))
    if tenant is None:
        tenant = Tenant(
            id=new_id("tenant"), name=name, created_at=database_now(session), last_served_at=None
        )
        session.add(tenant)
        session.flush()
    return tenant


def insert_key(session: Session, key: ApiKey) -> None:
    """Store a new key; only its hash is in it."""
    session.add(key)
    session.flush()
    session.refresh(key)


def find_key(session: Session, sha256: str) -> ApiKey | None:
    """Read the key of a hash, revoked and expired ones included."""
    return session.scalar(select(ApiKey).where(ApiKey.sha256 == sha256))


def get_key(session: Session, tenant_id: str, key_id: str) -> ApiKey:
    """Read a tenant's key.

    Raises:
        KeyNotFound: there is none, or it is another tenant's.
    """
    key = session.get(ApiKey, key_id)
    if key is None or key.tenant_id != tenant_id:
        raise KeyNotFound
    return key


def list_keys(session: Session, tenant_id: str) -> Sequence[ApiKey]:
    """Read all keys of a tenant, newest first."""
    query = (
        select(ApiKey)
        .where(ApiKey.tenant_id == tenant_id)
        .order_by(ApiKey.created_at.desc(), ApiKey.id.desc())
    )
    return session.scalars(query).all()


def count_keys(session: Session) -> int:
    """Count the keys of all tenants, revoked ones included."""
    return session.scalar(select(func.count()).select_from(ApiKey)) or 0


def revoke_key(session: Session, tenant_id: str, key_id: str) -> ApiKey:
    """Make a key useless from now on; a revoked key stays as it is.

    Raises:
        KeyNotFound: there is none, or it is another tenant's.
    """
    key = get_key(session, tenant_id, key_id)
    key.revoked_at = key.revoked_at or database_now(session)
    session.flush()
    return key


def note_key_use(session: Session, key_id: str, moment: datetime) -> None:
    """Remember when a key was last used."""
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=moment))
