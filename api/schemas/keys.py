"""API keys as clients ask for and see them; the key itself is shown once, when it is made."""

from datetime import datetime
from enum import StrEnum
from typing import Literal, Self

from pydantic import AwareDatetime, Field

from api.db.tables.access import ApiKey
from api.schemas.base import Schema

__all__ = ["ApiKeyOut", "ApiKeyRequest", "NewApiKey", "Scope"]


class Scope(StrEnum):
    """What a key may be used for."""

    QUANT_READ = "quant:read"
    """See quantizations, their events and layers."""
    QUANT_WRITE = "quant:write"
    """Create, cancel and retry quantizations."""
    ARTIFACTS_READ = "artifacts:read"
    """List and download results."""
    DEPLOY_WRITE = "deploy:write"
    """Host and remove models."""
    INFER_INVOKE = "infer:invoke"
    """Generate with hosted models."""
    KEYS_ADMIN = "keys:admin"
    """Create, list and revoke keys."""
    ADMIN = "admin"
    """All of these."""


class ApiKeyRequest(Schema):
    """A key for a purpose."""

    name: str = Field(min_length=1, max_length=100)
    scopes: tuple[Scope, ...] = Field(min_length=1)
    expires_at: AwareDatetime | None = None


class ApiKeyOut(Schema):
    """A key, without its secret."""

    object: Literal["api_key"] = "api_key"
    id: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey) -> "ApiKeyOut":
        """Show a key."""
        names = [each for each in ApiKeyOut.model_fields if each != "object"]
        return ApiKeyOut(**{name: getattr(key, name) for name in names})


class NewApiKey(ApiKeyOut):
    """A key that was just made; `key` is not stored and cannot be shown again."""

    key: str

    @classmethod
    def of_issued(cls, row: ApiKey, text: str) -> Self:
        """Show a key together with its text."""
        return cls(**dict(ApiKeyOut.of(row)), key=text)
