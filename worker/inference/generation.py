"""Generations: admitted or refused, queued in order, cancelled with their caller."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from api.errors import (
    InferenceDraining,
    InferenceOverloaded,
    InferenceUnavailable,
    UnsupportedParameter,
)
from api.telemetry import get_logger
from engine.errors import DeviceFailed, EngineError, GuideFailed
from engine.inference.request import GenerationChunk, GenerationRequest
from engine.inference.scoring import PromptScorer
from engine.inference.steps import TokenLogprobs
from worker.inference.activity import end_of
from worker.inference.arrivals import Arrivals
from worker.inference.metrics import InferenceMetrics
from worker.inference.pool import ModelInUse, ModelPool
from worker.inference.prompts import GenerationRefused, guide_field, named_for, read_requests
from worker.inference.records import Batch, RecordWriter, error_record
from worker.inference.schemas import GenerateBody
from worker.inference.timing import RequestTiming

__all__ = ["Generations"]

log = get_logger(__name__)

Scores = tuple[TokenLogprobs | None, ...]


@runtime_checkable
class Submitting(Protocol):
    """An engine that queues requests itself and calls back with chunks, without a thread each."""

    def submit(
        self,
        request: GenerationRequest,
        deliver: Callable[[GenerationChunk | EngineError], None],
        is_cancelled: Callable[[], bool],
    ) -> object:
        """Take a request; raises as `InferenceEngine.generate` does."""

    def check_together(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse several requests that never find room at one time."""


class Generations:
    """The queue in front of the models."""

    def __init__(
        self, pool: ModelPool, metrics: InferenceMetrics, *, max_waiting: int, max_running: int
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._limit = max_running + max_waiting
        self._turns = asyncio.Semaphore(max_running)
        self._admitted = 0

    @property
    def count(self) -> int:
        """Answers that run or wait."""
        return self._admitted

    async def run(self, body: GenerateBody) -> AsyncGenerator[Batch]:
        """Yield the records of one request, those that came together at once.

        Closing the generator cancels it. Whatever is wrong with the request is raised before the
        first record.

        Raises:
            InferenceOverloaded: as many requests wait as may.
            ServiceError: the model or the request cannot be served.
        """
        admitted = time.perf_counter()
        with self._admit(body.count, body.answers):
            async with self._pool.use(body.artifact_id) as model:
                requests = await asyncio.to_thread(read_requests, body, model.engine)
                run = _Run(
                    body=body,
                    model=model,
                    requests=requests,
                    timing=RequestTiming(self._metrics, model, admitted),
                    turns=self._turns,
                    cancelled=threading.Event(),
                )
                async with aclosing(run.batches()) as batches:
                    async for batch in batches:
                        yield batch

    @contextmanager
    def _admit(self, prompts: int, answers: int) -> Iterator[None]:
        if self._pool.is_draining:
            raise InferenceDraining
        if prompts > self._limit:
            raise GenerationRefused(
                f"prompt = {prompts} prompts is not possible: use up to {self._limit} at once",
                param="prompt",
            )
        # whether so many ever find room is the engine's to say: alone they are let through
        count = min(answers, self._limit)
        if self._admitted + count > self._limit:
            raise InferenceOverloaded
        self._admitted += count
        try:
            yield
        finally:
            self._admitted -= count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One request on its model."""

    body: GenerateBody
    model: ModelInUse
    requests: Sequence[GenerationRequest]
    timing: RequestTiming
    turns: asyncio.Semaphore
    cancelled: threading.Event

    async def batches(self) -> AsyncGenerator[Batch]:
        """Yield the records from start to end."""
        prompts, body = [each.prompt_ids for each in self.requests], self.body
        writer = RecordWriter(self.model.engine.text, prompts, body.n, body.written)
        arrivals, pulls = Arrivals(), list[asyncio.Task[None]]()
        try:
            echoed = await self._score() if self.body.echo else None
            if self.body.max_tokens == 0:
                yield [writer.start(echoed), *writer.finish_unanswered(), writer.end()]
                return
            pulls = await self._begin(arrivals)
            yield [writer.start(echoed)]
            async with aclosing(self._answers(writer, arrivals)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self.cancelled.set()
            for pull in pulls:
                pull.cancel()
            self._log_end(writer)

    async def _answers(self, writer: RecordWriter, arrivals: Arrivals) -> AsyncGenerator[Batch]:
        try:
            while True:
                taken = await arrivals.take()
                self.timing.follow(taken)
                batch = writer.write(taken)
                if writer.is_cancelled:
                    yield [error_record("cancelled", "the generation was cancelled")]
                    return
                if writer.is_complete:
                    yield [*batch, writer.end()]
                    return
                if batch:
                    yield batch
        except EngineError as error:
            # another replica, or this one after a new start, may well answer it
            is_lost = isinstance(error, DeviceFailed) or end_of(self.model.engine) is not None
            code = InferenceUnavailable.code if is_lost else error.code
            log.warning("answer_failed", code=error.code, reason=error.message)
            field = guide_field(self.body) if isinstance(error, GuideFailed) else None
            message = error.message if field is None else f"{field}: {error.message}"
            yield [error_record(code, message, field)]
        except Exception:
            # a fault of one request is that request's end, not the process's
            log.exception("generation_failed")
            yield [error_record("internal_error", "the generation failed")]

    async def _score(self) -> list[Scores]:
        """Log-probabilities of the prompts, where they are asked for."""
        top, engine = self.body.logprobs, self.model.engine
        if top is None:
            return [()] * len(self.requests)
        if not isinstance(engine, PromptScorer):
            raise UnsupportedParameter(
                "echo together with logprobs is not possible with this model; leave one of them"
                " out",
                param="echo",
            )
        scores = []
        for request in self.requests:
            async with self.turns:
                with named_for(self.body):
                    found = await asyncio.to_thread(
                        engine.score_prompt,
                        request.prompt_ids,
                        top,
                        self.cancelled.is_set,
                        tenant=request.tenant,
                        cache_salt=request.cache_salt,
                    )
                scores.append(found)
        return scores

    async def _begin(self, arrivals: Arrivals) -> list[asyncio.Task[None]]:
        """Have the engine check and take all prompts, or none."""
        engine = self.model.engine
        with named_for(self.body):
            if isinstance(engine, Submitting):
                # a guide is compiled here: not in the loop's thread
                await asyncio.to_thread(self._submit, engine, arrivals)
                for prompt, request in enumerate(self.requests):
                    self.timing.begin(prompt, len(request.prompt_ids))
                return []
            streams = [engine.generate(each, self.cancelled.is_set) for each in self.requests]
        return [
            asyncio.create_task(self._pull(prompt, chunks, arrivals))
            for prompt, chunks in enumerate(streams)
        ]

    def _submit(self, engine: Submitting, arrivals: Arrivals) -> None:
        engine.check_together(self.requests)
        for prompt, request in enumerate(self.requests):
            engine.submit(request, arrivals.deliver_to(prompt), self.cancelled.is_set)

    async def _pull(
        self, prompt: int, chunks: Iterator[GenerationChunk], arrivals: Arrivals
    ) -> None:
        activity = self.model.activity
        activity.waiting += 1
        try:
            await self.turns.acquire()
        finally:
            activity.waiting -= 1
        activity.running += 1
        try:
            self.timing.begin(prompt, len(self.requests[prompt].prompt_ids))
            await arrivals.pull(prompt, chunks)
        finally:
            activity.running -= 1
            self.turns.release()

    def _log_end(self, writer: RecordWriter) -> None:
        log.info(
            "generation_ended",
            artifact_id=self.body.artifact_id,
            is_complete=writer.is_complete,
            prompt_tokens=writer.prompt_tokens,
            completion_tokens=writer.completion_tokens,
        )
