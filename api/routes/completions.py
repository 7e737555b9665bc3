"""OpenAI-compatible `/v1/chat/completions`, `/v1/completions` and `/v1/models`; `/v1/tokenize`."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from api.auth import Principal
from api.deps import CursorDep, DatabaseDep, HostingDep, InferInvoker
from api.schemas.answers import ChatCompletion, Completion, HostedModel
from api.schemas.base import Page
from api.schemas.chat import ChatCompletionRequest
from api.schemas.completions import CompletionRequest
from api.schemas.sampling import GenerationRequest
from api.schemas.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from api.services import deployments, tokens
from api.services.completions import Generation, Hosting, start_generation

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
    body: ChatCompletionRequest, request: Request, hosting: HostingDep, principal: InferInvoker
) -> Response:
    """Continue a conversation with a hosted model."""
    return await _generate(body, request, hosting, principal)


@router.post("/completions", response_model=Completion, responses=STREAM)
async def create_completion(
    body: CompletionRequest, request: Request, hosting: HostingDep, principal: InferInvoker
) -> Response:
    """Continue texts with a hosted model."""
    return await _generate(body, request, hosting, principal)


@router.post("/tokenize")
async def tokenize(
    body: TokenizeRequest, request: Request, hosting: HostingDep, principal: InferInvoker
) -> Tokenized:
    """Turn a text or a conversation into the token ids of a hosted model."""
    return await tokens.tokenize(hosting, principal, body, request.state.request_id)


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, request: Request, hosting: HostingDep, principal: InferInvoker
) -> Detokenized:
    """Turn token ids of a hosted model into text."""
    return await tokens.detokenize(hosting, principal, body, request.state.request_id)


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


class _EventStream(StreamingResponse):
    """A stream whose generation is closed with the connection, even if nothing was read of it."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation.stream(), 200, STREAM_HEADERS, EVENT_STREAM)
        self._generation = generation

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.close()


async def _generate(
    body: GenerationRequest, request: Request, hosting: Hosting, principal: Principal
) -> Response:
    start = start_generation(hosting, principal, body, request.state.request_id)
    generation = await _while_connected(request, start)
    if generation is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if body.stream:
        return _EventStream(generation)
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
