"""Completions of hosted models: the records of the inference service, as OpenAI's callers read."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from anyio import CancelScope
from anyio.to_thread import run_sync

from api.auth import Principal
from api.db.connection import Database
from api.errors import ServiceError
from api.schemas.answers import ChatCompletion, Completion
from api.schemas.base import OpenAIError
from api.schemas.sampling import GenerationRequest
from api.services.answers import AnswerShape, Draft, shape_of
from api.services.deployments import find_hosted
from api.services.inference import Batch, InferenceClient
from api.services.limits import KeyLimits, Slot
from api.services.payloads import generation_payload
from api.services.tally import Tally
from api.telemetry import get_logger

__all__ = ["Generation", "Hosting", "start_generation"]

log = get_logger(__name__)

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosting:
    """What generations need of the app."""

    database: Database
    inference: InferenceClient
    limits: KeyLimits


async def start_generation(
    hosting: Hosting, principal: Principal, request: GenerationRequest, request_id: str
) -> "Generation":
    """Have a hosted model begin; returns when it has, so that a refusal has a status of its own.

    Raises:
        RateLimited: the key has as much running as it may, or used up its tokens.
        ModelNotHosted: the tenant hosts no such model.
        ServiceError: what the inference service refused the request for.
        InferenceUnavailable: no inference service answers, or all are full.
    """
    slot, tally = hosting.limits.enter(principal.key_id), Tally()
    try:
        found = await run_sync(find_hosted, hosting.database, principal.tenant_id, request.model)
        payload = generation_payload(request, found.artifact_id, principal)
        batches = hosting.inference.generate(payload, request_id)
        first = await anext(batches)
    except BaseException:
        slot.leave(tally.tokens)
        raise
    return Generation(
        first=first,
        rest=batches,
        shape=shape_of(request, int(time.time())),
        tally=tally,
        slot=slot,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A generation that has begun; read it once, as a whole or as a stream, and close it."""

    first: Batch
    rest: AsyncGenerator[Batch]
    shape: AnswerShape
    tally: Tally
    slot: Slot
    drafts: dict[int, Draft] = field(default_factory=dict)

    async def collect(self) -> ChatCompletion | Completion:
        """Wait for the end and give the whole answer.

        Raises:
            ServiceError: the generation failed.
        """
        try:
            self._draft(self.first)
            async for batch in self.rest:
                self._draft(batch)
        finally:
            await self.close()
        ordered = [self.drafts[index] for index in sorted(self.drafts)]
        return self.shape.whole(ordered, self.tally.usage())

    async def stream(self) -> AsyncGenerator[bytes]:
        """Give server-sent events; a fault after the start is an event too."""
        try:
            for chunk in self.shape.opening(self.tally):
                yield _event(chunk)
            yield self._events(self.first)
            async with aclosing(_with_pauses(self.rest, KEEP_ALIVE_S)) as batches:
                async for batch in batches:
                    yield KEEP_ALIVE if batch is None else self._events(batch)
            yield DONE
        except ServiceError as error:
            log.warning("generation_failed", code=error.code, message=error.message)
            failure = OpenAIError.of(
                status=error.status, code=error.code, message=error.message, param=error.param
            )
            yield _event(failure.model_dump())
        finally:
            await self.close()

    async def close(self) -> None:
        """Cancel what still runs, and count what was used; a second call does nothing."""
        with CancelScope(shield=True):
            await self.rest.aclose()
        self.slot.leave(self.tally.tokens)

    def _draft(self, batch: Batch) -> None:
        for record in batch:
            self.tally.add(record)
            for index, text, tokens in _pieces(record):
                draft = self.drafts.setdefault(index, Draft())
                draft.texts.append(text)
                draft.tokens.extend(tokens)
            if record["type"] == "finish":
                draft = self.drafts.setdefault(record["index"], Draft())
                draft.finish_reason = record["finish_reason"]

    def _events(self, batch: Batch) -> bytes:
        """All events of what came in together: one write to the connection."""
        return b"".join(_event(chunk) for record in batch for chunk in self._chunks(record))

    def _chunks(self, record: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        self.tally.add(record)
        match record["type"]:
            case "finish":
                return [self.shape.finish(record["index"], record["finish_reason"], self.tally)]
            case "end":
                return list(self.shape.closing(self.tally))
            case _:
                return [self.shape.piece(*piece, self.tally) for piece in _pieces(record)]


def _pieces(record: Mapping[str, Any]) -> list[tuple[int, str, Sequence[Mapping[str, Any]]]]:
    """Choice, text and tokens of a record: of the text that came, or of an echoed prompt."""
    match record["type"]:
        case "start":
            found = record.get("echo", ())
        case "token":
            found = (record,)
        case _:
            found = ()
    return [(each["index"], each["text"], each.get("logprobs") or ()) for each in found]


async def _with_pauses(
    batches: AsyncGenerator[Batch], pause_s: float
) -> AsyncGenerator[Batch | None]:
    """Yield what comes, and None after each `pause_s` seconds in which nothing does."""
    while True:
        upcoming = asyncio.ensure_future(anext(batches, None))
        try:
            while not (await asyncio.wait({upcoming}, timeout=pause_s))[0]:
                yield None
            batch = await upcoming
        finally:
            # when the caller went away this ends the request to the inference service; the shield
            # lets the connection close although this task itself is being cancelled
            upcoming.cancel()
            with CancelScope(shield=True):
                await asyncio.gather(upcoming, return_exceptions=True)
        if batch is None:
            return
        yield batch


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
