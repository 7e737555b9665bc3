"""Artifacts, their files, and the deployments that host them."""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.db.repositories.pages import Cursor, Page, read_page
from api.db.tables.artifacts import Artifact, ArtifactFile, Deployment
from api.errors import ArtifactNotFound, DeploymentConflict, DeploymentNotFound, FileNotInArtifact

__all__ = [
    "artifact_of_job",
    "count_deployments_of",
    "delete_deployment",
    "find_deployment",
    "get_artifact",
    "get_deployment",
    "get_file",
    "insert_deployment",
    "list_deployments",
    "list_files",
]


def get_artifact(session: Session, tenant_id: str, artifact_id: str) -> Artifact:
    """Read a tenant's artifact.

    Raises:
        ArtifactNotFound: there is none, or it is another tenant's.
    """
    artifact = session.get(Artifact, artifact_id)
    if artifact is None or artifact.tenant_id != tenant_id:
        raise ArtifactNotFound
    return artifact


def artifact_of_job(session: Session, tenant_id: str, job_id: str) -> Artifact:
    """Read the artifact that a tenant's job made.

    Raises:
        ArtifactNotFound: the job has made none, or is another tenant's.
    """
    query = select(Artifact).where(Artifact.job_id == job_id, Artifact.tenant_id == tenant_id)
    artifact = session.scalar(query)
    if artifact is None:
        raise ArtifactNotFound
    return artifact


def list_files(session: Session, artifact_id: str) -> Sequence[ArtifactFile]:
    """Read all files of an artifact, by path."""
    query = (
        select(ArtifactFile)
        .where(ArtifactFile.artifact_id == artifact_id)
        .order_by(ArtifactFile.path)
    )
    return session.scalars(query).all()


def get_file(session: Session, artifact_id: str, path: str) -> ArtifactFile:
    """Read one file of an artifact.

    Raises:
        FileNotInArtifact: the artifact has no file of exactly this path.
    """
    file = session.get(ArtifactFile, (artifact_id, path))
    if file is None:
        raise FileNotInArtifact
    return file


def insert_deployment(session: Session, deployment: Deployment) -> None:
    """Host an artifact under a name.

    Raises:
        DeploymentConflict: the tenant uses the name already.
    """
    try:
        # a savepoint: the caller's transaction outlives the refused row
        with session.begin_nested():
            session.add(deployment)
    except IntegrityError as error:
        raise DeploymentConflict from error
    session.refresh(deployment)


def get_deployment(session: Session, tenant_id: str, deployment_id: str) -> Deployment:
    """Read a tenant's deployment by its id.

    Raises:
        DeploymentNotFound: there is none, or it is another tenant's.
    """
    deployment = session.get(Deployment, deployment_id)
    if deployment is None or deployment.tenant_id != tenant_id:
        raise DeploymentNotFound
    return deployment


def find_deployment(session: Session, tenant_id: str, name: str) -> Deployment:
    """Read a tenant's deployment by the name that callers write as `model`.

    Raises:
        DeploymentNotFound: the tenant has none of that name.
    """
    query = select(Deployment).where(Deployment.tenant_id == tenant_id, Deployment.name == name)
    deployment = session.scalar(query)
    if deployment is None:
        raise DeploymentNotFound
    return deployment


def list_deployments(
    session: Session, tenant_id: str, cursor: Cursor | None = None
) -> Page[Deployment]:
    """Read one page of a tenant's deployments, newest first.

    Raises:
        InvalidRequest: the cursor is not valid.
    """
    return read_page(session, Deployment, select(Deployment), tenant_id, cursor or Cursor())


def delete_deployment(session: Session, tenant_id: str, deployment_id: str) -> Deployment:
    """Stop hosting an artifact under a name; returns what was deleted.

    Raises:
        DeploymentNotFound: there is none, or it is another tenant's.
    """
    deployment = get_deployment(session, tenant_id, deployment_id)
    session.execute(delete(Deployment).where(Deployment.id == deployment.id))
    return deployment


def count_deployments_of(session: Session, artifact_id: str) -> int:
    """Count the names under which an artifact is hosted."""
    query = select(Deployment.id).where(Deployment.artifact_id == artifact_id)
    return len(session.scalars(query).all())
