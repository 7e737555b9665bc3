"""OpenAI-compatible `/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse, StreamingResponse

from api.auth import Principal
from api.deps import CursorDep, DatabaseDep, InferInvoker, Ports, PortsDep
from api.schemas.base import Page
from api.schemas.completions import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    GenerationRequest,
    HostedModel,
)
from api.services import deployments
from api.services.completions import start_generation

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["completions"])

EVENT_STREAM = "text/event-stream"
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}
}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_CLOSED_REQUEST = 499
"""Seen in the log and the metrics only: there is nobody to answer."""

Result = TypeVar("Result")


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAM)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, ports: PortsDep, principal: InferInvoker
) -> Response:
    """Continue a conversation with a hosted model."""
    return await _generate(body, request, ports, principal)


@router.post("/completions", response_model=Completion, responses=STREAM)
async def create_completion(
    body: CompletionRequest, request: Request, ports: PortsDep, principal: InferInvoker
) -> Response:
    """Continue a text with a hosted model."""
    return await _generate(body, request, ports, principal)


@router.get("/models")
def list_models(
    database: DatabaseDep, principal: InferInvoker, cursor: CursorDep
) -> Page[HostedModel]:
    """List the hosted models."""
    return deployments.list_hosted(database, principal.tenant_id, cursor)


@router.get("/models/{model:path}")
def get_model(model: str, database: DatabaseDep, principal: InferInvoker) -> HostedModel:
    """Read one hosted model."""
    return HostedModel.of(deployments.find_hosted(database, principal.tenant_id, model))


async def _generate(
    body: GenerationRequest, request: Request, ports: Ports, principal: Principal
) -> Response:
    start = start_generation(ports.database, ports.inference, principal.tenant_id, body)
    generation = await _while_connected(request, start)
    if generation is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if body.stream:
        return StreamingResponse(generation.stream(), 200, STREAM_HEADERS, EVENT_STREAM)
    answer = await _while_connected(request, generation.collect())
    if answer is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(answer.model_dump(mode="json"))


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Wait for the work; cancel it and return None when the client goes away first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(leaving, working, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
