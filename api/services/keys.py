"""API keys: the first one, and those that keys make for others."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.auth import Principal, hash_key, new_key
from api.db.base import new_id
from api.db.connection import Database, database_now
from api.db.repositories import access
from api.db.repositories.jobs import lock_tenant
from api.db.tables.access import ApiKey
from api.errors import InvalidRequest, ScopeMissing
from api.schemas.keys import ApiKeyRequest, Scope

__all__ = ["IssuedKey", "create_first_key", "create_key", "list_keys", "revoke_key"]

FIRST_TENANT = "default"
FIRST_NAME = "first"
PREFIX_LENGTH = 13
"""`abq_live_` and four random characters: enough to tell keys apart, nothing to guess from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedKey:
    """A new key: its row and its text, which is stored nowhere."""

    row: ApiKey
    text: str


def create_first_key(database: Database) -> str | None:
    """Make a key for everything if there is no key at all; returns its text, else None.

    Of several processes that start at once, one makes it.
    """
    with suppress(IntegrityError), database.write() as session:
        if access.count_keys(session) > 0:
            return None
        # others wait for the name or for the lock, and count again behind it
        tenant = access.get_or_create_tenant(session, FIRST_TENANT)
        lock_tenant(session, tenant.id)
        if access.count_keys(session) > 0:
            return None
        wanted = ApiKeyRequest(name=FIRST_NAME, scopes=(Scope.ADMIN,))
        return _issue(session, tenant.id, wanted).text
    return None


def create_key(database: Database, principal: Principal, wanted: ApiKeyRequest) -> IssuedKey:
    """Make a key of the principal's tenant.

    Raises:
        ScopeMissing: a key cannot give what it does not have.
        InvalidRequest: the key would have expired already.
    """
    for scope in wanted.scopes:
        if not principal.may(scope):
            raise ScopeMissing(
                f"This key cannot give the scope {scope}, which it does not have.", param="scopes"
            )
    with database.write() as session:
        if wanted.expires_at is not None and wanted.expires_at <= database_now(session):
            raise InvalidRequest(
                f"expires_at = {wanted.expires_at.isoformat()} has passed; name a later time",
                param="expires_at",
            )
        return _issue(session, principal.tenant_id, wanted)


def list_keys(database: Database, tenant_id: str) -> Sequence[ApiKey]:
    """Read a tenant's keys, newest first, revoked ones included."""
    with database.read() as session:
        return access.list_keys(session, tenant_id)


def revoke_key(database: Database, tenant_id: str, key_id: str) -> ApiKey:
    """Make a key useless from now on.

    Raises:
        KeyNotFound: there is none, or it is another tenant's.
    """
    with database.write() as session:
        return access.revoke_key(session, tenant_id, key_id)


def _issue(session: Session, tenant_id: str, wanted: ApiKeyRequest) -> IssuedKey:
    text = new_key()
    row = ApiKey(
        id=new_id("key"),
        tenant_id=tenant_id,
        name=wanted.name,
        prefix=text[:PREFIX_LENGTH],
        sha256=hash_key(text),
        scopes=[str(each) for each in wanted.scopes],
        created_at=database_now(session),
        expires_at=wanted.expires_at,
        last_used_at=None,
        revoked_at=None,
    )
    access.insert_key(session, row)
    return IssuedKey(row=row, text=text)
