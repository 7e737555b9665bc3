"""What a successful attempt leaves: an artifact with its files, and the job's end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from api.db.connection import database_now
from api.db.repositories.leases import Lease, complete_job
from api.db.tables.artifacts import Artifact, ArtifactFile
from api.db.tables.jobs import Job
from api.hub.base import PublishedModel
from worker.publish import StoredArtifact

__all__ = ["Outcome", "Push"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """How the push to the Hub ended; neither where none was asked for."""

    published: PublishedModel | None = None
    error: dict[str, Any] | None = None
    """`code`, `message` and `layer` of a push that the Hub refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A job's result, complete in the store and not yet in the database."""

    job: Job
    artifact_id: str
    report: Mapping[str, Any]
    """What the engine measured, and `publish_error` where a push was refused."""
    stored: StoredArtifact
    published: PublishedModel | None

    def commit(self, session: Session, lease: Lease) -> None:
        """End the job with its artifact in one transaction.

        Raises:
            LeaseLost: the job is another worker's now.
        """
        stored, published = self.stored, self.published
        artifact = Artifact(
            id=self.artifact_id,
            tenant_id=self.job.tenant_id,
            job_id=self.job.id,
            manifest_sha256=stored.manifest_sha256,
            bytes=stored.bytes,
            bits_per_weight=stored.bits_per_weight,
            summary=stored.summary,
            hub_commit=None if published is None else published.to_json(),
            created_at=database_now(session),
        )
        files = [
            ArtifactFile(
                artifact_id=self.artifact_id, path=file.path, bytes=file.bytes, sha256=file.sha256
            )
            for file in stored.files
        ]
        complete_job(session, lease, report=self.report, artifact=artifact, files=files)
