"""`/v1/deployments`: host results under a model name."""

from fastapi import APIRouter, Request, Response
from starlette.status import HTTP_201_CREATED, HTTP_202_ACCEPTED

from api.deps import CursorDep, DatabaseDep, DeployWriter, InferenceDep
from api.routes.links import link_to_next
from api.schemas.base import Deleted, Page
from api.schemas.deployments import DeploymentOut, DeploymentRequest
from api.services import deployments

__all__ = ["router"]

router = APIRouter(prefix="/v1/deployments", tags=["deployments"])


@router.post("", status_code=HTTP_201_CREATED)
def create_deployment(
    body: DeploymentRequest,
    response: Response,
    database: DatabaseDep,
    inference: InferenceDep,
    principal: DeployWriter,
) -> DeploymentOut:
    """Host an artifact; the model is loaded in the background."""
    deployment = deployments.create_deployment(database, inference, principal.tenant_id, body)
    response.headers["Location"] = f"/v1/deployments/{deployment.id}"
    return deployment


@router.get("")
def list_deployments(
    request: Request,
    response: Response,
    database: DatabaseDep,
    inference: InferenceDep,
    principal: DeployWriter,
    cursor: CursorDep,
) -> Page[DeploymentOut]:
    """List deployments, newest first."""
    page = deployments.list_deployments(database, inference, principal.tenant_id, cursor)
    response.headers.update(link_to_next(request, page))
    return page


@router.get("/{deployment_id}")
def get_deployment(
    deployment_id: str, database: DatabaseDep, inference: InferenceDep, principal: DeployWriter
) -> DeploymentOut:
    """Read a deployment and whether its model is in memory."""
    return deployments.get_deployment(database, inference, principal.tenant_id, deployment_id)


@router.post("/{deployment_id}/load", status_code=HTTP_202_ACCEPTED)
def load_deployment(
    deployment_id: str, database: DatabaseDep, inference: InferenceDep, principal: DeployWriter
) -> DeploymentOut:
    """Have the model read into memory; `stage` and `progress` say how far it is."""
    return deployments.load_deployment(database, inference, principal.tenant_id, deployment_id)


@router.post("/{deployment_id}/unload")
def unload_deployment(
    deployment_id: str, database: DatabaseDep, inference: InferenceDep, principal: DeployWriter
) -> DeploymentOut:
    """Drop the model from memory; the next request loads it again."""
    return deployments.unload_deployment(database, inference, principal.tenant_id, deployment_id)


@router.delete("/{deployment_id}")
def delete_deployment(
    deployment_id: str, database: DatabaseDep, inference: InferenceDep, principal: DeployWriter
) -> Deleted:
    """Stop hosting; the artifact stays."""
    deployments.delete_deployment(database, inference, principal.tenant_id, deployment_id)
    return Deleted(id=deployment_id, object="deployment")
