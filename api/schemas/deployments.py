"""Hosted models as clients ask for and see them."""

from datetime import datetime
from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, model_validator

from api.db.tables.artifacts import Deployment
from api.schemas.base import Schema

__all__ = ["DeploymentOut", "DeploymentRequest", "DeploymentStatus"]


class DeploymentStatus(StrEnum):
    """What the inference service says of a hosted model."""

    IDLE = "idle"
    """Not in memory; the next request loads it."""
    LOADING = "loading"
    """Being read into memory."""
    READY = "ready"
    """In memory, answering."""
    FAILED = "failed"
    """Could not be loaded; `error` says why."""
    UNKNOWN = "unknown"
    """The inference service does not answer."""


class DeploymentRequest(Schema):
    """An artifact to host, by its own id or by that of its quantization."""

    artifact_id: str | None = Field(default=None, max_length=40)
    quantization_id: str | None = Field(default=None, max_length=40)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.@/-]{0,99}$")
    """What callers write as `model`; none makes one of the source's name and the bits."""

    @model_validator(mode="after")
    def _name_one_artifact(self) -> Self:
        if (self.artifact_id is None) == (self.quantization_id is None):
            raise ValueError("give artifact_id or quantization_id, and not both")
        return self


class DeploymentOut(Schema):
    """A hosted model."""

    object: Literal["deployment"] = "deployment"
    id: str
    name: str
    artifact_id: str
    status: DeploymentStatus
    error: str | None
    memory_bytes: int | None
    created_at: datetime

    @classmethod
    def of(
        cls,
        deployment: Deployment,
        status: DeploymentStatus,
        *,
        error: str | None = None,
        memory_bytes: int | None = None,
    ) -> Self:
        """Show a deployment and what the inference service says of it."""
        return cls(
            id=deployment.id,
            name=deployment.name,
            artifact_id=deployment.artifact_id,
            status=status,
            error=error,
            memory_bytes=memory_bytes,
            created_at=deployment.created_at,
        )
