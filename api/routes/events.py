"""`/v1/quantizations/{id}/events`: the story of a job, as a list or as it happens."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Query, Response
from starlette.responses import StreamingResponse

from api.deps import PortsDep, QuantReader
from api.schemas.base import Page
from api.schemas.quantizations import JobEventOut
from api.services.events import EventFeed, read_events

__all__ = ["router"]

router = APIRouter(prefix="/v1/quantizations", tags=["quantizations"])

EVENT_STREAM = "text/event-stream"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
HEARTBEAT_S = 15.0
RECONNECT_MS = 3000
MAX_EVENTS = 1000
MAX_ID = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Which events a client wants, and how."""

    after_id: int
    limit: int
    is_stream: bool


def get_reading(
    accept: Annotated[str, Header()] = "application/json",
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_ID)] = None,
    after: Annotated[int, Query(ge=0, le=MAX_ID)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100,
) -> Reading:
    """`Last-Event-ID`, which browsers send by themselves, wins over `after`."""
    after_id = after if last_event_id is None else last_event_id
    return Reading(after_id=after_id, limit=limit, is_stream=EVENT_STREAM in accept)


@router.get(
    "/{job_id}/events",
    response_model=Page[JobEventOut],
    responses={200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}},
)
async def list_quantization_events(
    job_id: str,
    ports: PortsDep,
    principal: QuantReader,
    reading: Annotated[Reading, Depends(get_reading)],
) -> Page[JobEventOut] | Response:
    """List events behind `after`, oldest first, or follow them with `Accept: text/event-stream`.

    A stream sends what lies behind `Last-Event-ID` or `after`, then what happens; it ends with
    `event: done`.
    """
    one_more = reading.limit + 1
    key = (ports.database, principal.tenant_id, job_id)
    events = await run_sync(read_events, *key, reading.after_id, one_more)
    if reading.is_stream:
        stream = _stream(ports.feed, job_id, reading.after_id)
        return StreamingResponse(stream, 200, STREAM_HEADERS, EVENT_STREAM)
    shown = [JobEventOut.of(event) for event in events[: reading.limit]]
    return Page[JobEventOut].of(shown, has_more=len(events) == one_more)


async def _stream(feed: EventFeed, job_id: str, after_id: int) -> AsyncGenerator[str]:
    yield f"retry: {RECONNECT_MS}\n\n"
    async with aclosing(feed.watch(job_id, after_id, HEARTBEAT_S)) as batches:
        async for batch in batches:
            if batch is None:
                yield ": still here\n\n"
                continue
            for event in batch.events:
                data = JobEventOut.of(event).model_dump_json()
                yield f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
            if batch.final_status is not None:
                yield f'event: done\ndata: {{"status":"{batch.final_status}"}}\n\n'
