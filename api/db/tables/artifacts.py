"""Tables of what jobs leave behind: artifacts, their files, and the deployments that host them."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from api.db.base import Base

__all__ = ["Artifact", "ArtifactFile", "Deployment"]


class Artifact(Base):
    """A complete quantized checkpoint in the object store."""

    __tablename__ = "artifacts"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    bits_per_weight: Mapped[float]
    summary: Mapped[dict[str, Any]]
    """The manifest without its file list: source, spec, bits, evaluation."""
    hub_commit: Mapped[dict[str, Any] | None]
    """`{"repo_id", "revision", "url"}` where the artifact was pushed."""
    created_at: Mapped[datetime]


class ArtifactFile(Base):
    """One file of an artifact; the only paths that a download may name."""

    __tablename__ = "artifact_files"

    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class Deployment(Base):
    """An artifact hosted under a model name; the inference service loads it on demand."""

    __tablename__ = "deployments"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name", name="uq_deployments_tenant_name"),
        Index("ix_deployments_tenant_created", "tenant_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"))
    name: Mapped[str] = mapped_column(String(100))
    """What callers write as `model`."""
    created_at: Mapped[datetime]
