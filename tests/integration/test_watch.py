"""How a claimed job is held while its work runs, over both databases."""

import time
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url

from api.db.repositories.events import list_events
from api.db.repositories.leases import LeaseLost, cancel_job_finished, claim_job
from api.db.tables.jobs import Job
from api.dispatch import reap_jobs
from api.services.jobs import cancel_job
from api.settings import WorkerSettings
from tests.integration.machine import wait_until
from worker.background import BackgroundWork, WorkStopped
from worker.lifeline import Lifeline
from worker.watch import Stopped, StopReason, Watch

SETTINGS = WorkerSettings(lease_s=30.0, heartbeat_s=0.1, grace_s=0.5)


@pytest.fixture
def lifeline():
    made = Lifeline.open()
    yield made
    made.let_go()


@pytest.fixture
def hold(database, queue_job, lifeline):
    """Claim a new job and watch over it."""

    def claim(settings=SETTINGS):
        queue_job()
        with database.write() as session:
            claimed = claim_job(session, worker="w", lease_s=settings.lease_s, free_vram_bytes=None)
        return Watch(database, claimed.lease, settings, lifeline), claimed.job

    return claim


def events_of(database, job, kind):
    with database.read() as session:
        return [event.data for event in list_events(session, job.id) if event.type == kind]


def run_until_stopped(reporter):
    while True:
        reporter.pause(0.01)


def test_of_progress_the_latest_is_written_twice_a_second(hold, database):
    watch, job = hold()

    def work(reporter):
        for done in range(101):
            reporter.report("download.progress", bytes=done, total=100)
            reporter.pause(0.01)

    started = time.monotonic()
    watch.follow(BackgroundWork(work, name="work"))
    seconds = time.monotonic() - started

    written = [data["bytes"] for data in events_of(database, job, "download.progress")]
    assert written[-1] == 100
    assert 2 <= len(written) <= 2 * seconds + 2


def test_progress_stays_in_order_with_what_happens(hold, database):
    watch, job = hold()

    watch.record(
        {"type": "download.progress", "bytes": 1, "total": 2},
        {"type": "download.progress", "bytes": 2, "total": 2},
        {"type": "stage.started", "stage": "calibrating"},
    )

    with database.read() as session:
        kinds = [event.type for event in list_events(session, job.id)]
    assert kinds[-2:] == ["download.progress", "stage.started"]


def test_work_that_is_cancelled_ends_and_says_why(hold, database, tenant_id):
    watch, job = hold()
    cancel_job(database, tenant_id, job.id)
    work = BackgroundWork(run_until_stopped, name="work")

    with pytest.raises(Stopped) as stopped:
        watch.follow(work)

    assert stopped.value.reason is StopReason.CANCELLED
    with pytest.raises(WorkStopped):
        work.result()


def test_work_that_ends_while_it_is_cancelled_is_cancelled(hold, database, tenant_id):
    watch, job = hold()

    def work(reporter):
        cancel_job(database, tenant_id, job.id)
        time.sleep(0.3)
        return "done"

    with pytest.raises(Stopped):
        watch.follow(BackgroundWork(work, name="work"))


def test_a_worker_that_stops_takes_its_work_down(hold, lifeline):
    watch, _ = hold()
    lifeline.let_go()

    with pytest.raises(Stopped) as stopped:
        watch.follow(BackgroundWork(run_until_stopped, name="work"))

    assert stopped.value.reason is StopReason.SHUTDOWN


def test_work_that_does_not_stop_is_given_up_after_its_grace(hold, lifeline):
    watch, _ = hold()
    lifeline.let_go()
    started = time.monotonic()

    with pytest.raises(Stopped):
        watch.follow(BackgroundWork(lambda reporter: time.sleep(60), name="deaf"))

    assert SETTINGS.grace_s <= time.monotonic() - started < 30


def test_work_of_a_lost_lease_is_killed(hold, database, settings):
    watch, _ = hold(SETTINGS.model_copy(update={"lease_s": 0.3, "heartbeat_s": 60.0}))
    wait_until(lambda: reap_jobs(database, settings) > 0, "the lease did not end", 5)
    ended = []

    def work(reporter):
        try:
            while True:
                reporter.report("log", message="still here")
                reporter.pause(0.05)
        finally:
            ended.append(True)

    with pytest.raises(LeaseLost):
        watch.follow(BackgroundWork(work, name="work"))

    wait_until(lambda: ended, "the work goes on", 5)


@contextmanager
def closed(server, url):
    """A database that nobody can reach inside the block."""
    name = make_url(url).database
    server.execute(
        f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false',
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",  # noqa: S608 - a name of the test's own
    )
    try:
        yield
    finally:
        server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
class TestWithoutDatabase:
    def test_what_happens_while_it_restarts_is_written_afterwards(
        self, hold, database, database_url, postgres_server
    ):
        watch, job = hold()

        def work(reporter):
            with closed(postgres_server, database_url):
                reporter.report("log", message="unseen")
                reporter.pause(0.5)

        watch.follow(BackgroundWork(work, name="work"))
        watch.settle(lambda session, lease: session.get_one(Job, lease.job_id))

        assert events_of(database, job, "log") == [{"message": "unseen"}]

    def test_the_end_brings_what_could_not_be_written_before(
        self, hold, database, database_url, postgres_server
    ):
        watch, job = hold()
        with closed(postgres_server, database_url):
            watch.record({"type": "log", "message": "unseen"})

        watch.settle(cancel_job_finished)

        assert events_of(database, job, "log") == [{"message": "unseen"}]

    def test_work_without_it_for_longer_than_the_lease_is_killed(
        self, hold, database_url, postgres_server
    ):
        watch, _ = hold(SETTINGS.model_copy(update={"lease_s": 0.5}))
        work = BackgroundWork(run_until_stopped, name="work")

        with closed(postgres_server, database_url), pytest.raises(LeaseLost):
            watch.follow(work)

        assert work.is_done
