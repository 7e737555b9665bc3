"""API keys: their text form, what is stored of them, and who a request speaks for.

A key is `abq_live_`, 30 base62 characters (178 random bits) and 6 that are a CRC32 of the rest,
so that a typing error is refused without a query and secret scanners recognize a leaked key. At
178 bits a plain SHA-256 is enough: there is nothing to guess.
"""

import hmac
import secrets
import string
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from zlib import crc32

from sqlalchemy.exc import OperationalError

from api.db.connection import Database, database_now
from api.db.repositories import access
from api.db.tables.access import ApiKey
from api.errors import KeyMissing, KeyRejected
from api.schemas.keys import Scope

__all__ = ["Principal", "authenticate", "hash_key", "is_well_formed", "new_key"]

PREFIX = "abq_live_"
RANDOM_CHARACTERS = 30
CHECK_CHARACTERS = 6
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
# a use is recorded this often at most, so that reading does not become writing
LAST_USED_STEP = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Whom a request speaks for."""

    tenant_id: str
    key_id: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether the key carries the scope."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


def new_key() -> str:
    """Make a fresh key."""
    body = PREFIX + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARACTERS))
    return body + _check_characters(body)


def hash_key(key: str) -> str:
    """The stored form of a key: hexadecimal SHA-256."""
    return sha256(key.encode()).hexdigest()


def is_well_formed(key: str) -> bool:
    """Whether prefix, length and check characters fit; asks no database."""
    length = len(PREFIX) + RANDOM_CHARACTERS + CHECK_CHARACTERS
    if not (key.isascii() and key.startswith(PREFIX) and len(key) == length):
        return False
    body, check = key[:-CHECK_CHARACTERS], key[-CHECK_CHARACTERS:]
    return hmac.compare_digest(check, _check_characters(body))


def authenticate(database: Database, key: str | None) -> Principal:
    """Find out whom a key speaks for.

    Raises:
        KeyMissing: without a key.
        KeyRejected: if it is unknown, expired or revoked.
    """
    if not key:
        raise KeyMissing
    if not is_well_formed(key):
        raise KeyRejected("This is no API key: its check characters do not fit.")
    digest = hash_key(key)
    with database.read() as session:
        row = access.find_key(session, digest)
        now = database_now(session)
    if row is None or not hmac.compare_digest(row.sha256, digest):
        raise KeyRejected
    if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
        raise KeyRejected
    if row.last_used_at is None or now - row.last_used_at > LAST_USED_STEP:
        # a database too busy to note the use still serves the request
        with suppress(OperationalError), database.write() as session:
            access.note_key_use(session, row.id, now)
    return _principal(row)


def _principal(row: ApiKey) -> Principal:
    return Principal(tenant_id=row.tenant_id, key_id=row.id, scopes=frozenset(row.scopes))


def _check_characters(body: str) -> str:
    value, characters = crc32(body.encode()), ""
    for _ in range(CHECK_CHARACTERS):
        value, digit = divmod(value, len(ALPHABET))
        characters = ALPHABET[digit] + characters
    return characters
