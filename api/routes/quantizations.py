"""`/v1/quantizations`: estimate, create, list, read, cancel, retry, layers and the result."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from starlette.status import HTTP_202_ACCEPTED, HTTP_304_NOT_MODIFIED

from api.db.repositories.jobs import JobFilter
from api.db.tables.jobs import TERMINAL, Job, JobStatus
from api.deps import (
    ArtifactReader,
    CursorDep,
    DatabaseDep,
    DeskDep,
    PortsDep,
    QuantReader,
    QuantWriter,
)
from api.errors import InvalidRequest
from api.routes.links import link_to_next
from api.schemas.artifacts import ArtifactOut
from api.schemas.base import Page
from api.schemas.quantizations import Estimate, JobLayerOut, Quantization, QuantizationRequest
from api.services import artifacts, jobs
from api.services.events import await_job

__all__ = ["router"]

router = APIRouter(prefix="/v1/quantizations", tags=["quantizations"])

RETRY_AFTER_S = 2
MAX_WAIT_S = 60
WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})")
LABEL = "label."
LIST_PARAMETERS = ("status", "model", "after", "before", "limit")

IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]


def get_filter(
    request: Request,
    status: Annotated[JobStatus | None, Query()] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
) -> JobFilter:
    """Which quantizations a list holds; `label.<key>=<value>` may be given several times."""
    labels = {}
    for name, value in request.query_params.multi_items():
        if name.startswith(LABEL) and name != LABEL:
            labels[name.removeprefix(LABEL)] = value
        elif name not in LIST_PARAMETERS:
            known = f"{', '.join(LIST_PARAMETERS)} or label.<key>"
            raise InvalidRequest(f"{name} is no known parameter; use {known}.", param=name)
    return JobFilter(status=status, model=model, labels=labels)


def get_wait_s(prefer: Annotated[str | None, Header()] = None) -> int:
    """Read `Prefer: wait=N`, in seconds; 0 without it."""
    match = WAIT.search(prefer or "")
    return min(int(match[1]), MAX_WAIT_S) if match else 0


@router.post("/estimate")
def estimate_quantization(
    body: QuantizationRequest, desk: DeskDep, _principal: QuantReader
) -> Estimate:
    """Say what a quantization would need and give, or why it would be refused."""
    return desk.estimate(body)


@router.post("", status_code=HTTP_202_ACCEPTED)
def create_quantization(
    body: QuantizationRequest,
    response: Response,
    desk: DeskDep,
    principal: QuantWriter,
    idempotency_key: IdempotencyKey = None,
) -> Quantization:
    """Queue a quantization. An equal request with the same `Idempotency-Key` gets the same job."""
    job = desk.create(principal.tenant_id, body, idempotency_key)
    response.headers["Location"] = f"/v1/quantizations/{job.id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return Quantization.of(job)


@router.get("")
def list_quantizations(
    request: Request,
    response: Response,
    database: DatabaseDep,
    principal: QuantReader,
    wanted: Annotated[JobFilter, Depends(get_filter)],
    cursor: CursorDep,
) -> Page[Quantization]:
    """List quantizations, newest first. `label.<key>=<value>` filters by label."""
    found = jobs.list_jobs(database, principal.tenant_id, wanted, cursor)
    shown = [Quantization.of(job) for job in found.items]
    page = Page[Quantization].of(shown, has_more=found.has_more)
    response.headers.update(link_to_next(request, page))
    return page


@router.get(
    "/{job_id}",
    response_model=Quantization,
    responses={HTTP_304_NOT_MODIFIED: {"description": "Nothing changed since that ETag."}},
)
async def get_quantization(
    job_id: str,
    response: Response,
    ports: PortsDep,
    principal: QuantReader,
    wait_s: Annotated[int, Depends(get_wait_s)],
    if_none_match: Annotated[str | None, Header()] = None,
) -> Quantization | Response:
    """Read a quantization; `Prefer: wait=N` holds the answer until its end, at most 60 seconds."""
    job = await await_job(ports.database, ports.feed, principal.tenant_id, job_id, wait_s)
    headers = _job_headers(job, wait_s)
    if headers["ETag"] in [tag.strip() for tag in (if_none_match or "").split(",")]:
        return Response(status_code=HTTP_304_NOT_MODIFIED, headers=headers)
    response.headers.update(headers)
    return Quantization.of(job)


@router.post("/{job_id}/cancel")
def cancel_quantization(job_id: str, database: DatabaseDep, principal: QuantWriter) -> Quantization:
    """Stop a quantization; its layer checkpoints stay. Asking again changes nothing."""
    return Quantization.of(jobs.cancel_job(database, principal.tenant_id, job_id))


@router.post("/{job_id}/retry", status_code=HTTP_202_ACCEPTED)
def retry_quantization(
    job_id: str, response: Response, ports: PortsDep, principal: QuantWriter
) -> Quantization:
    """Queue a failed or cancelled quantization again; it goes on from its layer checkpoints."""
    job = jobs.retry_job(ports.database, ports.settings, principal.tenant_id, job_id)
    response.headers["Location"] = f"/v1/quantizations/{job.id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return Quantization.of(job)


@router.get("/{job_id}/layers")
def list_quantization_layers(
    job_id: str, database: DatabaseDep, principal: QuantReader
) -> Page[JobLayerOut]:
    """List what became of each decoder layer so far, in the order of the model."""
    layers = jobs.list_layers(database, principal.tenant_id, job_id)
    return Page[JobLayerOut].of([JobLayerOut.of(layer) for layer in layers])


@router.get("/{job_id}/artifacts")
def get_quantization_artifact(
    job_id: str, database: DatabaseDep, principal: ArtifactReader
) -> ArtifactOut:
    """Read the manifest of the result: every file with its size, sha256 and address."""
    found = artifacts.get_artifact_of_job(database, principal.tenant_id, job_id)
    return ArtifactOut.of(found.artifact, found.files)


def _job_headers(job: Job, wait_s: int) -> dict[str, str]:
    headers = {"ETag": f'W/"{job.version}"', "Cache-Control": "private, no-cache"}
    if job.status not in TERMINAL:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if wait_s:
        headers["Preference-Applied"] = f"wait={wait_s}"
    return headers
