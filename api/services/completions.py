"""Completions of hosted models: the records of the inference service, as OpenAI's callers read."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from anyio import CancelScope
from anyio.to_thread import run_sync

from api.db.connection import Database
from api.errors import InferenceUnavailable, ServiceError
from api.schemas.base import OpenAIError
from api.schemas.completions import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    GenerationRequest,
)
from api.services.answers import AnswerShape, shape_of
from api.services.deployments import find_hosted
from api.services.inference import InferenceClient, error_of_record
from api.telemetry import get_logger

__all__ = ["Generation", "start_generation"]

log = get_logger(__name__)

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

Record = dict[str, Any]


async def start_generation(
    database: Database, inference: InferenceClient, tenant_id: str, request: GenerationRequest
) -> "Generation":
    """Have a hosted model begin; returns when it has, so that a refusal has a status of its own.

    Raises:
        ModelNotHosted: the tenant hosts no such model.
        ServiceError: what the inference service refused the request for.
        InferenceUnavailable: the inference service is down or full.
    """
    hosted = await run_sync(find_hosted, database, tenant_id, request.model)
    records = inference.generate({"artifact_id": hosted.artifact_id, **_payload(request)})
    first = await anext(records, None)
    if first is None:
        raise InferenceUnavailable("The inference service broke off; try again.")
    if first["type"] == "error":
        await records.aclose()
        raise error_of_record(first)
    return Generation(records=records, shape=shape_of(request, int(time.time())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A generation that has begun; read it once, as a whole or as a stream."""

    records: AsyncGenerator[Record]
    shape: AnswerShape

    async def collect(self) -> ChatCompletion | Completion:
        """Wait for the end and give the whole answer.

        Raises:
            ServiceError: the generation failed.
        """
        texts: list[str] = []
        async with aclosing(self.records) as records:
            async for record in records:
                match record["type"]:
                    case "token":
                        texts.append(record["text"])
                    case "end":
                        return self.shape.whole("".join(texts), record)
                    case "error":
                        raise error_of_record(record)
        raise InferenceUnavailable("The inference service broke off; try again.")

    async def stream(self) -> AsyncGenerator[bytes]:
        """Give server-sent events; a fault after the start is an event too."""
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    yield KEEP_ALIVE if chunk is None else _event(chunk)
            yield DONE
        except ServiceError as error:
            log.warning("generation_failed", code=error.code, message=error.message)
            failure = OpenAIError.of(
                status=error.status, code=error.code, message=error.message, param=error.param
            )
            yield _event(failure.model_dump())

    async def _chunks(self) -> AsyncGenerator[Record | None]:
        for chunk in self.shape.opening():
            yield chunk
        async with aclosing(_with_pauses(self.records, KEEP_ALIVE_S)) as records:
            async for record in records:
                if record is None:
                    yield None
                    continue
                match record["type"]:
                    case "token":
                        yield self.shape.text(record["text"])
                    case "end":
                        for chunk in self.shape.closing(record):
                            yield chunk
                        return
                    case "error":
                        raise error_of_record(record)
        raise InferenceUnavailable("The inference service broke off; try again.")


def _payload(request: GenerationRequest) -> Record:
    payload: Record = {
        "max_tokens": request.token_limit,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "stop": list(request.stop),
    }
    match request:
        case ChatCompletionRequest():
            payload["messages"] = [each.model_dump() for each in request.messages]
        case CompletionRequest():
            payload["prompt"] = request.prompt
    return payload


async def _with_pauses(
    records: AsyncGenerator[Record], pause_s: float
) -> AsyncGenerator[Record | None]:
    """Yield the records, and None after each `pause_s` seconds without one."""
    while True:
        upcoming = asyncio.ensure_future(anext(records, None))
        try:
            while not (await asyncio.wait({upcoming}, timeout=pause_s))[0]:
                yield None
            record = await upcoming
        finally:
            # when the caller went away this ends the request to the inference service; the shield
            # lets the connection close although this task itself is being cancelled
            upcoming.cancel()
            with CancelScope(shield=True):
                await asyncio.gather(upcoming, return_exceptions=True)
        if record is None:
            return
        yield record


def _event(data: Record) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
