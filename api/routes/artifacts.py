"""`/v1/artifacts/{id}/files/{path}`: download a result, in one go or in pieces."""

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from api.deps import ArtifactReader, DatabaseDep, StoreDep
from api.services.artifacts import open_download

__all__ = ["router"]

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])

CONDITIONS = ("range", "if-range", "if-none-match")
MEDIA_TYPE = "application/octet-stream"
FILE = {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file.", **FILE},
    206: {"description": "The range that was asked for.", **FILE},
    304: {"description": "The client has the file."},
}


@router.get("/{artifact_id}/files/{path:path}", response_class=Response, responses=RESPONSES)
def download_file(
    artifact_id: str,
    path: str,
    request: Request,
    database: DatabaseDep,
    store: StoreDep,
    principal: ArtifactReader,
) -> Response:
    """Download a file; `Range`, `If-Range` and `If-None-Match` are understood."""
    conditions = {name: request.headers[name] for name in CONDITIONS if name in request.headers}
    key = (artifact_id, path)
    download = open_download(database, store, principal.tenant_id, key, conditions)
    if download.is_unchanged:
        return Response(status_code=download.status, headers=download.headers)
    return StreamingResponse(download.read(), download.status, download.headers, MEDIA_TYPE)


@router.head("/{artifact_id}/files/{path:path}", response_class=Response, responses=RESPONSES)
def describe_file(
    artifact_id: str,
    path: str,
    request: Request,
    database: DatabaseDep,
    store: StoreDep,
    principal: ArtifactReader,
) -> Response:
    """Read a file's size, digest and validators without its bytes."""
    # a range has a meaning for GET only
    conditions = {name: request.headers[name] for name in CONDITIONS[2:] if name in request.headers}
    key = (artifact_id, path)
    download = open_download(database, store, principal.tenant_id, key, conditions)
    headers = {"Content-Type": MEDIA_TYPE, **download.headers}
    return Response(status_code=download.status, headers=headers)
