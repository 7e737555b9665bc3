"""Generations: admitted or refused, queued in order, cancelled with their caller."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from api.errors import (
    ContextTooLong,
    InferenceDraining,
    InferenceOverloaded,
    InferenceUnavailable,
    ServiceError,
)
from api.telemetry import get_logger
from engine.errors import ContextLengthExceeded, EngineError
from engine.inference.engine import InferenceEngine
from engine.inference.request import (
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    RequestInvalid,
)
from worker.inference.pool import ModelPool
from worker.inference.schemas import GenerateBody

__all__ = ["MAX_RUNNING", "GenerationRefused", "Generations"]

log = get_logger(__name__)

MAX_RUNNING = 4
"""Generations that take turns on the device; each holds a key-value cache."""

Record = dict[str, Any]


class GenerationRefused(ServiceError):
    """The request can never be served."""

    code = "invalid_request"
    status = 400


class Generations:
    """The queue in front of the models."""

    def __init__(
        self, pool: ModelPool, *, max_waiting: int, max_running: int = MAX_RUNNING
    ) -> None:
        self._pool = pool
        self._limit = max_running + max_waiting
        self._turns = asyncio.Semaphore(max_running)
        self._admitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether no generation runs or waits."""
        return self._admitted == 0

    async def run(self, body: GenerateBody) -> AsyncGenerator[Record]:
        """Yield the records of one generation; closing the generator cancels it.

        Whatever is wrong with the request is raised before the first record.

        Raises:
            InferenceOverloaded: as many requests wait as may.
            ServiceError: the model or the request cannot be served.
        """
        with self._admit():
            async with self._pool.use(body.artifact_id) as engine:
                request = await asyncio.to_thread(_read_request, body, engine)
                async with self._turns:
                    async for record in _records(engine, request):
                        yield record

    @contextmanager
    def _admit(self) -> Iterator[None]:
        if self._pool.is_draining:
            raise InferenceDraining
        if self._admitted >= self._limit:
            raise InferenceOverloaded
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1


def _read_request(body: GenerateBody, engine: InferenceEngine) -> GenerationRequest:
    try:
        return body.to_request(engine)
    except RequestInvalid as error:
        raise GenerationRefused(error.message, param=error.field) from error


async def _records(engine: InferenceEngine, request: GenerationRequest) -> AsyncGenerator[Record]:
    cancelled = threading.Event()
    chunks = _begin(engine, request, cancelled)
    prompt_tokens = len(request.prompt_ids)
    yield {"type": "start", "prompt_tokens": prompt_tokens}
    try:
        async for chunk in _in_thread(chunks):
            if chunk.text:
                yield {"type": "token", "text": chunk.text}
            if chunk.finish_reason is not None:
                yield _end_record(chunk, prompt_tokens)
    except EngineError as error:
        yield {"type": "error", "code": error.code, "message": error.message, "param": None}
    except Exception:
        # a fault of one request is that request's end, not the process's
        log.exception("generation_failed")
        message = "the generation failed"
        yield {"type": "error", "code": "internal_error", "message": message, "param": None}
    finally:
        cancelled.set()


def _begin(
    engine: InferenceEngine, request: GenerationRequest, cancelled: threading.Event
) -> Iterator[GenerationChunk]:
    try:
        return engine.generate(request, cancelled.is_set)
    except ContextLengthExceeded as error:
        raise ContextTooLong(error.message, param=error.field) from error
    except RequestInvalid as error:
        raise GenerationRefused(error.message, param=error.field) from error
    except EngineError as error:
        # unloaded between the wait for its turn and the turn
        raise InferenceUnavailable(error.message) from error


def _end_record(chunk: GenerationChunk, prompt_tokens: int) -> Record:
    if chunk.finish_reason is FinishReason.CANCELLED:
        message = "the generation was cancelled"
        return {"type": "error", "code": "cancelled", "message": message, "param": None}
    return {
        "type": "end",
        "finish_reason": str(chunk.finish_reason),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": chunk.completion_tokens,
    }


async def _in_thread(chunks: Iterator[GenerationChunk]) -> AsyncIterator[GenerationChunk]:
    """Iterate in a thread; the thread stops by itself once the request is cancelled."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[GenerationChunk | BaseException | None] = asyncio.Queue()

    def pull() -> None:
        try:
            for chunk in chunks:
                loop.call_soon_threadsafe(arrived.put_nowait, chunk)
            loop.call_soon_threadsafe(arrived.put_nowait, None)
        except BaseException as error:  # noqa: BLE001 - raised again in the loop's thread
            loop.call_soon_threadsafe(arrived.put_nowait, error)

    pulling = loop.run_in_executor(None, pull)
    while (item := await arrived.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item
    await pulling
