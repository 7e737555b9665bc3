"""The feed of events on its own: slow watchers, late watchers, and a database that goes away."""

import asyncio
from contextlib import aclosing

import pytest
from sqlalchemy.exc import OperationalError

from api.db.repositories.leases import cancel_job_finished, claim_job, record_event, renew_lease
from api.services import events
from api.services.events import EventFeed
from api.services.jobs import cancel_job

WAIT_S = 60


@pytest.fixture
def job(queue_job):
    return queue_job()


@pytest.fixture
def lease(database, job):
    with database.write() as session:
        return claim_job(session, worker="w", lease_s=60, free_vram_bytes=None).lease


def record(database, lease, count):
    with database.write() as session:
        return [
            record_event(session, lease, "log", {"level": "info", "message": str(number)})
            for number in range(count)
        ]


def end(database, tenant_id, lease):
    cancel_job(database, tenant_id, lease.job_id)
    with database.write() as session:
        renew_lease(session, lease, 60)
        cancel_job_finished(session, lease)


async def collect(feed, job_id, pause_s=0.0):
    ids = []
    async with aclosing(feed.watch(job_id, 0, 5.0)) as batches:
        async for batch in batches:
            assert batch is not None, "nothing came for five seconds"
            ids += [event.id for event in batch.events]
            await asyncio.sleep(pause_s)
    return ids


def test_a_watcher_too_slow_for_its_queue_still_gets_every_event_once(
    database, tenant_id, job, lease, monkeypatch
):
    monkeypatch.setattr(events, "BACKLOG_BATCHES", 2)

    async def run():
        feed = EventFeed(database, poll_interval_s=0.01)
        slow = asyncio.create_task(collect(feed, job.id, pause_s=0.15))
        fast = asyncio.create_task(collect(feed, job.id))
        for _ in range(20):
            await asyncio.to_thread(record, database, lease, 1)
            await asyncio.sleep(0.02)
        await asyncio.to_thread(end, database, tenant_id, lease)
        seen = await asyncio.gather(slow, fast)
        await feed.close()
        return seen

    slow, fast = asyncio.run(run())

    assert slow == fast == sorted(set(fast))
    assert len(fast) == 24


def test_a_past_longer_than_a_page_is_told_in_order(database, tenant_id, job, lease, monkeypatch):
    monkeypatch.setattr(events, "PAGE", 10)
    record(database, lease, 95)
    end(database, tenant_id, lease)

    async def run():
        feed = EventFeed(database)
        seen = await collect(feed, job.id)
        await feed.close()
        return seen

    seen = asyncio.run(run())

    assert len(seen) == 99
    assert seen == sorted(set(seen))


def test_watchers_outlive_a_database_that_goes_away_for_a_while(
    database, tenant_id, job, lease, monkeypatch
):
    async def run():
        feed = EventFeed(database, poll_interval_s=0.01)
        watching = asyncio.create_task(collect(feed, job.id))
        await asyncio.sleep(0.1)
        with monkeypatch.context() as patch:
            patch.setattr(database, "read", lost_connection)
            await asyncio.sleep(0.1)
        await asyncio.to_thread(end, database, tenant_id, lease)
        seen = await watching
        await feed.close()
        return seen

    seen = asyncio.run(run())

    assert len(seen) == 4


def test_waiting_for_the_end_returns_with_it_or_with_the_time(database, tenant_id, job, lease):
    async def run():
        feed, loop = EventFeed(database, poll_interval_s=0.01), asyncio.get_running_loop()
        started = loop.time()
        await asyncio.wait_for(feed.wait_until_terminal(job.id, 0.2), WAIT_S)
        waited_s = loop.time() - started
        waiting = asyncio.create_task(feed.wait_until_terminal(job.id, 600))
        await asyncio.to_thread(end, database, tenant_id, lease)
        await asyncio.wait_for(waiting, WAIT_S)
        await asyncio.wait_for(feed.wait_until_terminal(job.id, 600), WAIT_S)
        await feed.close()
        return waited_s

    assert asyncio.run(run()) >= 0.2


def lost_connection():
    raise OperationalError("SELECT 1", {}, ConnectionError("server closed the connection"))
