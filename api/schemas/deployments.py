"""Hosted models as clients ask for and see them."""

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Self

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
    stage: str | None = None
    """Of a model being loaded: queued, verifying, reading or warming_up."""
    progress: float | None = None
    """How much of loading is done, 0 to 1."""
    memory_bytes: int | None
    """Of all replicas."""
    replicas: int | None = None
    """Inference services that have it ready."""
    running: int | None = None
    """Generations that run on it."""
    waiting: int | None = None
    """Generations that wait for it."""
    tokens_per_s: float | None = None
    """Generated in the last seconds, by all requests together."""
    created_at: datetime

    @classmethod
    def of(
        cls,
        deployment: Deployment,
        status: DeploymentStatus,
        **told: Any,
    ) -> Self:
        """Show a deployment; keywords are what the inference services say of it."""
        return cls(
            id=deployment.id,
            name=deployment.name,
            artifact_id=deployment.artifact_id,
            status=status,
            **{"error": None, "memory_bytes": None, **told},
            created_at=deployment.created_at,
        )
