"""What a client is told about a result: its manifest and where each file is."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Self
from urllib.parse import quote

from api.db.tables.artifacts import Artifact, ArtifactFile
from api.schemas.base import Schema

__all__ = ["ArtifactFileOut", "ArtifactOut"]


class ArtifactFileOut(Schema):
    """A file of an artifact."""

    path: str
    bytes: int
    sha256: str
    url: str
    """Below the address of this service."""


class ArtifactOut(Schema):
    """A complete quantized checkpoint."""

    object: Literal["artifact"] = "artifact"
    id: str
    quantization_id: str
    manifest_sha256: str
    bytes: int
    bits_per_weight: float
    """Counted from the stored tensors, scales and zero-points included."""
    summary: dict[str, Any]
    """Source, spec, bits and evaluation, as the manifest records them."""
    hub_commit: dict[str, Any] | None
    created_at: datetime
    files: tuple[ArtifactFileOut, ...]

    @classmethod
    def of(cls, artifact: Artifact, files: Sequence[ArtifactFile]) -> Self:
        """Show an artifact with its files."""
        root = f"/v1/artifacts/{artifact.id}/files/"
        shown = tuple(
            ArtifactFileOut(
                path=each.path, bytes=each.bytes, sha256=each.sha256, url=root + quote(each.path)
            )
            for each in files
        )
        return cls(
            id=artifact.id,
            quantization_id=artifact.job_id,
            manifest_sha256=artifact.manifest_sha256,
            bytes=artifact.bytes,
            bits_per_weight=artifact.bits_per_weight,
            summary=artifact.summary,
            hub_commit=artifact.hub_commit,
            created_at=artifact.created_at,
            files=shown,
        )
