"""The private HTTP face of the models: load, unload, generate as a stream of JSON lines."""

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Send
from typing_extensions import override

from api.errors import InferenceDraining, KeyRejected, ServiceError
from api.telemetry import get_logger
from worker.inference.generation import Generations
from worker.inference.pool import ModelPool
from worker.inference.schemas import GenerateBody

__all__ = ["create_app"]

log = get_logger(__name__)

MEDIA_TYPE = "application/x-ndjson"
RETRY_AFTER_S = 2


def create_app(pool: ModelPool, generations: Generations, token: str | None) -> FastAPI:
    """Make the app.

    Args:
        pool: the models in memory.
        generations: the queue in front of them.
        token: what callers must send; None trusts whoever can reach the port.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await pool.close()

    def check_token(x_abq_internal_token: Annotated[str, Header()] = "") -> None:
        if token is not None and not hmac.compare_digest(
            x_abq_internal_token.encode(), token.encode()
        ):
            raise KeyRejected("The internal token is missing or wrong.")

    app = FastAPI(title="ABQ inference", lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(ServiceError, _answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(Exception, _answer_fault)
    app.include_router(_model_routes(pool), dependencies=[Depends(check_token)])
    app.include_router(_generation_routes(generations), dependencies=[Depends(check_token)])
    app.include_router(_health_routes(pool))
    return app


def _model_routes(pool: ModelPool) -> APIRouter:
    router = APIRouter()

    @router.post("/models/{artifact_id}/load", status_code=202)
    async def load_model(artifact_id: str) -> dict[str, str]:
        pool.load(artifact_id)
        return {"artifact_id": artifact_id}

    @router.delete("/models/{artifact_id}", status_code=204)
    async def unload_model(artifact_id: str) -> None:
        await pool.unload(artifact_id)

    @router.get("/models")
    async def list_models() -> list[dict[str, Any]]:
        return [asdict(model) for model in pool.list_models()]

    return router


def _generation_routes(generations: Generations) -> APIRouter:
    router = APIRouter()

    @router.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        records = generations.run(body)
        # waiting for the first record gives a refusal its own status
        first = await _first_unless_gone(records, request)
        if first is None:
            return Response(status_code=499)
        return _RecordStream(_lines(first, records), media_type=MEDIA_TYPE)

    return router


def _health_routes(pool: ModelPool) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        if pool.is_draining:
            raise InferenceDraining
        return {"status": "ready"}

    return router


class _RecordStream(StreamingResponse):
    """A stream whose generator ends with the connection, however that ends."""

    @override
    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]  # always a generator here
            await super().stream_response(send)


async def _lines(
    first: dict[str, Any], records: AsyncGenerator[dict[str, Any]]
) -> AsyncGenerator[str]:
    async with aclosing(records):
        yield _line(first)
        async for record in records:
            yield _line(record)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


async def _first_unless_gone(
    records: AsyncGenerator[dict[str, Any]], request: Request
) -> dict[str, Any] | None:
    """The first record, or None when the caller goes away before it comes."""
    first = asyncio.ensure_future(anext(records))
    gone = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await first if first.done() else None
    finally:
        gone.cancel()
        if not first.done():
            first.cancel()
            await asyncio.wait({first})
            await records.aclose()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_refusal(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)  # noqa: S101 - registered for nothing else
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}
    return _error(error.status, error.code, error.message, error.param, headers)


async def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for nothing else
    fault = error.errors()[0]
    param = ".".join(str(part) for part in fault["loc"][1:]) or None
    return _error(400, "invalid_request", str(fault["msg"]), param, {})


async def _answer_fault(_request: Request, _fault: Exception) -> JSONResponse:
    # what it was is in the log; a caller learns no internals
    return _error(500, "internal_error", "the request failed", None, {})


def _error(
    status: int, code: str, message: str, param: str | None, headers: dict[str, str]
) -> JSONResponse:
    record = {"type": "error", "code": code, "message": message, "param": param}
    return JSONResponse(record, status_code=status, headers=headers)
