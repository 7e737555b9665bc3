"""Events of running jobs for any number of watchers: one poller a process reads, all are told.

A watcher first reads the job's past from the database and then what the poller hands it. Both
overlap, never leave a gap, and are joined by event id: an id goes out once, in order.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from anyio.to_thread import run_sync
from sqlalchemy.exc import SQLAlchemyError

from api.db.connection import Database
from api.db.repositories.events import list_events
from api.db.repositories.jobs import get_job
from api.db.repositories.positions import JobPosition, read_positions
from api.db.tables.jobs import TERMINAL, Job, JobEvent, JobStatus
from api.services import jobs
from api.telemetry import get_logger

__all__ = ["EventBatch", "EventFeed", "await_job", "read_events"]

log = get_logger(__name__)

POLL_INTERVAL_S = 0.25
PAGE = 500
BACKLOG_BATCHES = 64
"""A watcher slower than this many batches goes back to reading the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBatch:
    """Events of a job, oldest first, and its status where the job ends with them."""

    events: tuple[JobEvent, ...]
    final_status: JobStatus | None

    def behind(self, event_id: int) -> "EventBatch":
        """The same without the events up to an id."""
        events = tuple(event for event in self.events if event.id > event_id)
        return EventBatch(events=events, final_status=self.final_status)


def read_events(
    database: Database, tenant_id: str, job_id: str, after_id: int, limit: int
) -> Sequence[JobEvent]:
    """Read a tenant's job events behind an id.

    Raises:
        JobNotFound: as `get_job`.
    """
    with database.read() as session:
        get_job(session, tenant_id, job_id)
        return list_events(session, job_id, after_id, limit)


async def await_job(
    database: Database, feed: "EventFeed", tenant_id: str, job_id: str, wait_s: float
) -> Job:
    """Read a tenant's job, where asked when it has come to its end or `wait_s` have passed.

    Raises:
        JobNotFound: as `get_job`.
    """
    job = await run_sync(jobs.get_job, database, tenant_id, job_id)
    if wait_s <= 0 or job.status in TERMINAL:
        return job
    await feed.wait_until_terminal(job_id, wait_s)
    return await run_sync(jobs.get_job, database, tenant_id, job_id)


class EventFeed:
    """Polls the watched jobs while there are watchers. Belongs to one event loop."""

    def __init__(self, database: Database, poll_interval_s: float = POLL_INTERVAL_S) -> None:
        self._database = database
        self._poll_interval_s = poll_interval_s
        self._channels: dict[str, _Channel] = {}
        self._poller: asyncio.Task[None] | None = None
        self._is_closing = asyncio.Event()

    async def watch(
        self, job_id: str, after_id: int, idle_s: float
    ) -> AsyncGenerator[EventBatch | None]:
        """Yield what happens behind an event until the job's end.

        None comes after each `idle_s` seconds in which nothing happened.
        """
        watcher = await self._join(job_id)
        last = after_id
        try:
            while True:
                if watcher.is_behind:
                    watcher.is_behind = False
                    batch = await run_sync(self._read, job_id, last)
                    watcher.is_behind |= len(batch.events) == PAGE
                elif (news := await watcher.receive(idle_s)) is not None:
                    batch = news.behind(last)
                else:
                    yield None
                    continue
                last = batch.events[-1].id if batch.events else last
                yield batch
                if batch.final_status is not None:
                    return
        finally:
            self._leave(job_id, watcher)

    async def wait_until_terminal(self, job_id: str, seconds: float) -> None:
        """Return when the job has come to its end, at the latest after `seconds`."""
        position = (await run_sync(self._read_positions, [job_id])).get(job_id)
        if position is None or position.status in TERMINAL:
            return
        try:
            async with (
                asyncio.timeout(seconds),
                aclosing(self.watch(job_id, position.event_id, seconds)) as batches,
            ):
                async for _ in batches:
                    pass
        except TimeoutError:
            return

    async def close(self) -> None:
        """Stop the poller; a read that is under way comes to its end first."""
        self._is_closing.set()
        if self._poller is not None:
            await self._poller

    async def _join(self, job_id: str) -> "_Watcher":
        if job_id not in self._channels:
            # before the past is read, so that what happens in between is in the one or the other
            position = (await run_sync(self._read_positions, [job_id])).get(job_id)
            cursor = position.event_id if position else 0
            self._channels.setdefault(job_id, _Channel(cursor=cursor))
        watcher = _Watcher()
        self._channels[job_id].watchers.append(watcher)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        return watcher

    def _leave(self, job_id: str, watcher: "_Watcher") -> None:
        channel = self._channels[job_id]
        channel.watchers.remove(watcher)
        if not channel.watchers:
            del self._channels[job_id]

    async def _poll(self) -> None:
        while self._channels and not self._is_closing.is_set():
            cursors = {job_id: each.cursor for job_id, each in self._channels.items()}
            try:
                batches = await run_sync(self._read_news, cursors)
            except SQLAlchemyError:
                # the database may come back; the watchers wait on comments until then
                log.exception("event_poll_failed")
                batches = {}
            for job_id, batch in batches.items():
                if channel := self._channels.get(job_id):
                    channel.deliver(batch)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_closing.wait(), self._poll_interval_s)

    def _read_news(self, cursors: Mapping[str, int]) -> dict[str, EventBatch]:
        positions = self._read_positions(list(cursors))
        moved = [
            job_id
            for job_id, at in positions.items()
            if at.event_id > cursors[job_id] or at.status in TERMINAL
        ]
        return {job_id: self._read(job_id, cursors[job_id]) for job_id in moved}

    def _read(self, job_id: str, after_id: int) -> EventBatch:
        with self._database.read() as session:
            at = read_positions(session, [job_id])[job_id]
            events = tuple(list_events(session, job_id, after_id, PAGE))
        last = events[-1].id if events else after_id
        is_end = at.status in TERMINAL and last >= at.event_id
        return EventBatch(events=events, final_status=at.status if is_end else None)

    def _read_positions(self, job_ids: Sequence[str]) -> dict[str, JobPosition]:
        with self._database.read() as session:
            return read_positions(session, job_ids)


@dataclass(slots=True, eq=False)
class _Watcher:
    """One client's queue of batches."""

    is_behind: bool = True
    """Batches are missing from the queue; the database has them."""
    batches: asyncio.Queue[EventBatch] = field(
        default_factory=lambda: asyncio.Queue(BACKLOG_BATCHES)
    )

    def offer(self, batch: EventBatch) -> None:
        """Queue a batch, or leave it to the database when the client is too slow."""
        if self.batches.full():
            self.is_behind = True
        else:
            self.batches.put_nowait(batch)

    async def receive(self, idle_s: float) -> EventBatch | None:
        """Take the next batch; None when there is none for `idle_s` seconds."""
        try:
            return await asyncio.wait_for(self.batches.get(), idle_s)
        except TimeoutError:
            return None


@dataclass(slots=True)
class _Channel:
    """One watched job: how far the poller has read it, and who wants to know."""

    cursor: int
    watchers: list[_Watcher] = field(default_factory=list)

    def deliver(self, batch: EventBatch) -> None:
        """Hand a batch to all watchers."""
        self.cursor = batch.events[-1].id if batch.events else self.cursor
        for watcher in self.watchers:
            watcher.offer(batch)
