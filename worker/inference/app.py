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

from api.errors import InferenceDraining, InferenceUnavailable, KeyRejected, ServiceError
from api.telemetry import get_logger
from worker.inference.generation import Generations
from worker.inference.metrics import InferenceMetrics
from worker.inference.pool import ModelPool
from worker.inference.prompts import detokenize, tokenize
from worker.inference.records import Batch, error_record
from worker.inference.request_ids import RequestIds
from worker.inference.schemas import DetokenizeBody, GenerateBody, TokenizeBody

__all__ = ["create_app"]

log = get_logger(__name__)

MEDIA_TYPE = "application/x-ndjson"
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
LOAD_HEADER = "X-ABQ-Load"
RETRY_AFTER_S = 2


def create_app(
    pool: ModelPool, generations: Generations, metrics: InferenceMetrics, token: str | None
) -> FastAPI:
    """Make the app.

    Args:
        pool: the models in memory.
        generations: the queue in front of them.
        metrics: what `/metrics` shows.
        token: what callers must send; None trusts whoever can reach the port.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        idle = asyncio.create_task(pool.unload_idle())
        yield
        idle.cancel()
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
    app.include_router(_text_routes(pool), dependencies=[Depends(check_token)])
    app.include_router(_health_routes(pool, metrics))
    app.add_middleware(RequestIds)
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
        headers = {LOAD_HEADER: str(generations.count)}
        first = await _first_unless_gone(records, request)
        if first is None:
            return Response(status_code=499)
        return _RecordStream(_lines(first, records), headers=headers, media_type=MEDIA_TYPE)

    return router


def _text_routes(pool: ModelPool) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize_text(body: TokenizeBody) -> dict[str, Any]:
        async with pool.use(body.artifact_id) as model:
            return await asyncio.to_thread(tokenize, body, model.engine)

    @router.post("/detokenize")
    async def detokenize_ids(body: DetokenizeBody) -> dict[str, Any]:
        async with pool.use(body.artifact_id) as model:
            return await asyncio.to_thread(detokenize, body, model.engine)

    return router


def _health_routes(pool: ModelPool, metrics: InferenceMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.render(), media_type=PROMETHEUS_TEXT)

    @router.get("/health")
    async def health() -> dict[str, str]:
        if any(entry.is_hung for entry in pool.entries()):
            raise InferenceUnavailable("a model's engine hangs; the process must be started again")
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


async def _lines(first: Batch, batches: AsyncGenerator[Batch]) -> AsyncGenerator[str]:
    async with aclosing(batches):
        yield _text(first)
        async for batch in batches:
            yield _text(batch)


def _text(batch: Batch) -> str:
    """One line a record."""
    return "".join(
        json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in batch
    )


async def _first_unless_gone(records: AsyncGenerator[Batch], request: Request) -> Batch | None:
    """The first records, or None when the caller goes away before they come."""
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
    return JSONResponse(error_record(code, message, param), status_code=status, headers=headers)
