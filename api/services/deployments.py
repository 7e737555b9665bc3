"""Hosted models: which artifact answers under which name, and what the inference service holds."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from api.db.base import new_id
from api.db.connection import Database, database_now
from api.db.repositories import artifacts, jobs
from api.db.repositories.pages import Cursor
from api.db.tables.artifacts import Artifact, Deployment
from api.db.tables.jobs import JobStatus
from api.errors import (
    DeploymentNotFound,
    JobStateConflict,
    ModelNotHosted,
    ServiceError,
)
from api.schemas.answers import HostedModel
from api.schemas.base import Page
from api.schemas.deployments import DeploymentOut, DeploymentRequest, DeploymentStatus
from api.services.inference import InferenceClient
from api.telemetry import get_logger
from engine.spec import QuantSpec

__all__ = [
    "create_deployment",
    "delete_deployment",
    "find_hosted",
    "get_deployment",
    "list_deployments",
    "list_hosted",
    "load_deployment",
    "unload_deployment",
]

log = get_logger(__name__)

MAX_NAME = 100


def create_deployment(
    database: Database, inference: InferenceClient, tenant_id: str, wanted: DeploymentRequest
) -> DeploymentOut:
    """Host an artifact and have it loaded; an inference service that is down loads it later.

    Raises:
        ArtifactNotFound: there is none, or it is another tenant's.
        JobNotFound: as ArtifactNotFound, for a quantization's id.
        JobStateConflict: the quantization has no artifact yet.
        DeploymentConflict: the tenant uses the name already.
    """
    with database.write() as session:
        artifact = _find_artifact(session, tenant_id, wanted)
        deployment = Deployment(
            id=new_id("dep"),
            tenant_id=tenant_id,
            artifact_id=artifact.id,
            name=wanted.name or _default_name(session, tenant_id, artifact),
            created_at=database_now(session),
        )
        artifacts.insert_deployment(session, deployment)
    try:
        inference.load(deployment.artifact_id)
    except ServiceError as error:
        log.warning("load_failed", artifact=deployment.artifact_id, error=error.message)
    return _show(deployment, _loaded(inference))


def list_deployments(
    database: Database, inference: InferenceClient, tenant_id: str, cursor: Cursor
) -> Page[DeploymentOut]:
    """Read one page of a tenant's deployments, newest first.

    Raises:
        InvalidRequest: the cursor is not valid.
    """
    with database.read() as session:
        page = artifacts.list_deployments(session, tenant_id, cursor)
    loaded = _loaded(inference)
    shown = [_show(each, loaded) for each in page.items]
    return Page[DeploymentOut].of(shown, has_more=page.has_more)


def get_deployment(
    database: Database, inference: InferenceClient, tenant_id: str, deployment_id: str
) -> DeploymentOut:
    """Read a deployment and what the inference service says of it.

    Raises:
        DeploymentNotFound: there is none, or it is another tenant's.
    """
    with database.read() as session:
        deployment = artifacts.get_deployment(session, tenant_id, deployment_id)
    return _show(deployment, _loaded(inference))


def load_deployment(
    database: Database, inference: InferenceClient, tenant_id: str, deployment_id: str
) -> DeploymentOut:
    """Have a model read into memory before the next request asks for it.

    Raises:
        DeploymentNotFound: there is none, or it is another tenant's.
        ServiceError: no inference service takes it.
    """
    with database.read() as session:
        deployment = artifacts.get_deployment(session, tenant_id, deployment_id)
    inference.load(deployment.artifact_id)
    return _show(deployment, _loaded(inference))


def unload_deployment(
    database: Database, inference: InferenceClient, tenant_id: str, deployment_id: str
) -> DeploymentOut:
    """Drop a model from memory; it stays hosted, and the next request loads it again.

    Raises:
        DeploymentNotFound: there is none, or it is another tenant's.
        ServiceError: no inference service answers.
    """
    with database.read() as session:
        deployment = artifacts.get_deployment(session, tenant_id, deployment_id)
    inference.unload(deployment.artifact_id)
    return _show(deployment, _loaded(inference))


def delete_deployment(
    database: Database, inference: InferenceClient, tenant_id: str, deployment_id: str
) -> None:
    """Stop hosting; the model leaves memory unless another name hosts it too.

    Raises:
        DeploymentNotFound: there is none, or it is another tenant's.
    """
    with database.write() as session:
        deployment = artifacts.delete_deployment(session, tenant_id, deployment_id)
        is_last = artifacts.count_deployments_of(session, deployment.artifact_id) == 0
    if is_last:
        try:
            inference.unload(deployment.artifact_id)
        except ServiceError as error:
            # it leaves memory by itself when room is needed
            log.warning("unload_failed", artifact=deployment.artifact_id, error=error.message)


def list_hosted(database: Database, tenant_id: str, cursor: Cursor) -> Page[HostedModel]:
    """Read one page of the models that a tenant can ask for completions.

    Raises:
        InvalidRequest: the cursor is not valid.
    """
    with database.read() as session:
        page = artifacts.list_deployments(session, tenant_id, cursor)
    shown = [HostedModel.of(each) for each in page.items]
    return Page[HostedModel].of(shown, has_more=page.has_more)


def find_hosted(database: Database, tenant_id: str, name: str) -> Deployment:
    """Read the deployment that answers under a model name.

    Raises:
        ModelNotHosted: the tenant hosts no such model.
    """
    with database.read() as session:
        try:
            return artifacts.find_deployment(session, tenant_id, name)
        except DeploymentNotFound:
            raise ModelNotHosted(
                f"The model {name!r} is not hosted here; see /v1/models.", param="model"
            ) from None


def _find_artifact(session: Session, tenant_id: str, wanted: DeploymentRequest) -> Artifact:
    if wanted.artifact_id is not None:
        return artifacts.get_artifact(session, tenant_id, wanted.artifact_id)
    job = jobs.get_job(session, tenant_id, wanted.quantization_id or "")
    if job.status != JobStatus.SUCCEEDED:
        raise JobStateConflict(
            f"the quantization is {job.status}; only a succeeded one can be hosted"
        )
    return artifacts.artifact_of_job(session, tenant_id, job.id)


def _default_name(session: Session, tenant_id: str, artifact: Artifact) -> str:
    job = jobs.get_job(session, tenant_id, artifact.job_id)
    notation = QuantSpec.from_json(job.spec).notation.replace("*", "b")
    return f"{job.model.rsplit('/', 1)[-1][: MAX_NAME - len(notation) - 1]}-{notation}"


def _loaded(inference: InferenceClient) -> Mapping[str, Mapping[str, Any]] | None:
    """What is in memory by artifact id; None when the inference service does not answer."""
    try:
        return {each["artifact_id"]: each for each in inference.list_models()}
    except ServiceError:
        return None


def _show(deployment: Deployment, loaded: Mapping[str, Mapping[str, Any]] | None) -> DeploymentOut:
    if loaded is None:
        return DeploymentOut.of(deployment, DeploymentStatus.UNKNOWN)
    model = loaded.get(deployment.artifact_id)
    if model is None:
        return DeploymentOut.of(deployment, DeploymentStatus.IDLE)
    return DeploymentOut.of(
        deployment,
        DeploymentStatus(model["status"]),
        error=model.get("error"),
        stage=model.get("stage"),
        progress=model.get("progress"),
        memory_bytes=model.get("memory_bytes"),
        replicas=model.get("replicas"),
        running=model.get("running"),
        waiting=model.get("waiting"),
        tokens_per_s=model.get("tokens_per_s"),
    )
