import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from kombu.simple import SimpleQueue
from sqlalchemy import func, select, text, update

from api.db.connection import Database, database_now
from api.db.repositories.events import list_events
from api.db.repositories.idempotency import RequestKey
from api.db.repositories.jobs import get_job
from api.db.repositories.leases import claim_job, fail_job
from api.db.repositories.outbox import list_unsent, mark_sent
from api.db.tables.jobs import IdempotencyKey, Job, JobAttempt, JobStatus, OutboxMessage
from api.dispatch import DISPATCH_LOCK, BrokerUnreachable, Dispatcher, reap_jobs, relay_outbox
from api.queue import QUEUE, TaskName, create_celery
from api.services.jobs import NewJob, cancel_job, create_job
from api.settings import QueueSettings
from tests.concurrency import run_at_once

WAIT_S = 20.0


def take_messages(celery):
    """Take everything that waits in the queue, as arguments of tasks."""
    taken = []
    with celery.connection() as connection:
        queue = SimpleQueue(connection, QUEUE)
        while True:
            try:
                message = queue.get(block=True, timeout=0.2)
            except queue.Empty:
                break
            message.ack()
            taken.append((message.headers["task"], message.payload[0]))
        queue.close()
    return taken


def wait_until(is_true):
    end = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@contextmanager
def ending_after(process, seconds):
    """Kill a process at the end of the block, or earlier where it says nothing for too long."""
    alarm = threading.Timer(seconds, process.kill)
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()


def with_queue(settings, **fields):
    queue = settings.queue.model_copy(update=fields)
    return settings.model_copy(update={"queue": queue})


def read(database, job):
    with database.read() as session:
        return get_job(session, job.tenant_id, job.id)


def unsent(database):
    with database.read() as session:
        return [message.job_id for message in list_unsent(session, 1000)]


def claim(database, lease_s=60.0):
    with database.write() as session:
        return claim_job(session, worker="w", lease_s=lease_s, free_vram_bytes=None)


def date_back(database, job, seconds, count):
    with database.write() as session:
        moment = database_now(session) - timedelta(seconds=seconds)
        session.execute(
            update(Job).where(Job.id == job.id).values(published_at=moment, publish_count=count)
        )


@contextmanager
def dispatching(database, celery, settings):
    dispatcher = Dispatcher(database, celery, settings)
    dispatcher.start()
    try:
        yield
    finally:
        dispatcher.stop()


@pytest.fixture
def file_celery(settings):
    app = create_celery(settings)
    yield app
    app.close()


@pytest.fixture
def quick(settings):
    return with_queue(settings, relay_interval_s=0.05, reap_interval_s=0.1)


def test_the_relay_sends_the_task_and_the_id_of_the_job_and_nothing_else(
    database, celery, queue_job
):
    job = queue_job(labels={"secret": "not for the broker"})

    assert relay_outbox(database, celery) == 1

    assert take_messages(celery) == [(TaskName.RUN_JOB, [job.id])]
    assert unsent(database) == []
    stored = read(database, job)
    assert (stored.published_at is not None, stored.publish_count) == (True, 1)


def test_what_was_sent_is_not_sent_again(database, celery, queue_job):
    queue_job()
    relay_outbox(database, celery)
    take_messages(celery)

    assert relay_outbox(database, celery) == 0
    assert take_messages(celery) == []


CLAIM_AND_TELL = """
import sys
from api.db.connection import Database
from api.db.repositories.leases import claim_job
from api.queue import TaskName, create_celery
from api.settings import Settings

settings = Settings()
celery = create_celery(settings)
database = Database(settings.database_url)

@celery.task(name=TaskName.RUN_JOB)
def run_job(job_id):
    with database.write() as session:
        claimed = claim_job(session, worker="w", lease_s=60, free_vram_bytes=None)
    print("claimed" if claimed else "nothing", flush=True)

celery.conf.worker_redirect_stdouts = False
celery.worker_main(["--quiet", "worker", "--pool=solo", "--without-gossip", "--without-mingle"])
"""


def test_a_message_that_arrives_twice_runs_its_job_once(
    database, settings, celery, broker_url, queue_job
):
    job = queue_job()
    relay_outbox(database, celery)
    celery.send_task(TaskName.RUN_JOB, args=[job.id])

    environment = os.environ | {
        "ABQ_DATA_DIR": str(settings.data_dir),
        "ABQ_DATABASE__URL": settings.database_url,
        **({"ABQ_QUEUE__BROKER_URL": broker_url} if broker_url else {}),
    }
    worker = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_TELL], env=environment, stdout=subprocess.PIPE, text=True
    )
    with ending_after(worker, WAIT_S):
        lines = [worker.stdout.readline() for _ in range(2)]

    assert lines == ["claimed\n", "nothing\n"]


CREATE_AND_DIE = """
import os, signal, sys
from api.db.connection import Database
from api.services.jobs import NewJob, create_job
from api.settings import Settings

job = create_job(
    Database(sys.argv[1]), Settings(), sys.argv[2],
    NewJob(model="acme/tiny", revision=None, source_sha="f" * 40, spec={}, evaluation={}),
)
print(job.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_job_whose_api_was_killed_before_it_could_publish_is_published_by_the_next_one(
    database, database_url, tenant_id, celery, quick
):
    killed = subprocess.run(
        [sys.executable, "-c", CREATE_AND_DIE, database_url, tenant_id],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    job_id = killed.stdout.strip()
    assert unsent(database) == [job_id]

    with dispatching(database, celery, quick):
        wait_until(lambda: unsent(database) == [])

    assert take_messages(celery) == [(TaskName.RUN_JOB, [job_id])]


def test_a_redis_restarted_empty_gets_the_queued_jobs_again(
    database, settings, queue_job, mortal_redis
):
    impatient = with_queue(
        settings,
        broker_url=mortal_redis.url,
        relay_interval_s=0.05,
        reap_interval_s=0.1,
        republish_after_s=0.5,
    )
    celery = create_celery(impatient)
    job = queue_job()

    with dispatching(database, celery, impatient):
        wait_until(lambda: read(database, job).publish_count == 1)
        mortal_redis.kill()
        mortal_redis.start()
        wait_until(lambda: read(database, job).publish_count >= 2)

    assert (TaskName.RUN_JOB, [job.id]) in take_messages(celery)
    celery.close()


def test_a_broker_that_is_down_leaves_the_message_for_later(
    database, settings, queue_job, mortal_redis
):
    celery = create_celery(with_queue(settings, broker_url=mortal_redis.url))
    first = queue_job()
    assert relay_outbox(database, celery) == 1
    mortal_redis.kill()
    second = queue_job()

    started = time.monotonic()
    with pytest.raises(BrokerUnreachable):
        relay_outbox(database, celery)
    assert time.monotonic() - started < 30
    assert unsent(database) == [second.id]
    assert read(database, first).publish_count == 1

    mortal_redis.start()
    assert relay_outbox(database, celery) == 1
    assert take_messages(celery) == [(TaskName.RUN_JOB, [second.id])]
    celery.close()


def test_the_dispatcher_outlives_a_database_that_fails_for_a_while(
    database, file_celery, quick, queue_job
):
    with database.write() as session:
        session.execute(text("ALTER TABLE outbox RENAME TO hidden"))

    with dispatching(database, file_celery, quick):
        time.sleep(0.3)
        with database.write() as session:
            session.execute(text("ALTER TABLE hidden RENAME TO outbox"))
        queue_job()
        wait_until(lambda: unsent(database) == [])


def test_only_one_process_dispatches_on_postgres(postgres_url, file_celery, quick, request):
    database = Database(postgres_url)
    request.addfinalizer(database.close)
    with database.write() as session:
        session.execute(text("INSERT INTO tenants VALUES ('t', 't', now(), NULL)"))
    create_job(
        database, quick, "t",
        NewJob(model="a/b", revision=None, source_sha="f", spec={}, evaluation={}),
    )  # fmt: skip

    with database.read() as other_process:
        other_process.execute(select(func.pg_try_advisory_xact_lock(DISPATCH_LOCK)))
        with dispatching(database, file_celery, quick):
            time.sleep(0.5)
            assert len(unsent(database)) == 1
            other_process.rollback()
            wait_until(lambda: unsent(database) == [])


def test_the_dispatcher_finds_lost_jobs_and_wakes_a_worker_for_them(
    database, file_celery, quick, queue_job
):
    job = queue_job()
    relay_outbox(database, file_celery)
    take_messages(file_celery)
    claim(database, lease_s=-1)

    with dispatching(database, file_celery, quick):
        wait_until(lambda: read(database, job).status == JobStatus.QUEUED)
        wait_until(lambda: unsent(database) == [])

    assert take_messages(file_celery) == [(TaskName.RUN_JOB, [job.id])]


def test_more_messages_than_one_batch_leave_in_one_round(
    database, file_celery, settings, queue_job
):
    slow = with_queue(settings, relay_interval_s=0.5)
    for _ in range(3):
        queue_job()
    with database.write() as session:
        for message in list_unsent(session, 3):
            session.add_all(
                OutboxMessage(
                    task=message.task, job_id=message.job_id, created_at=message.created_at
                )
                for _ in range(70)
            )

    with dispatching(database, file_celery, slow):
        wait_until(lambda: len(unsent(database)) < 213)
        wait_until(lambda: unsent(database) == [])

    assert len(take_messages(file_celery)) == 213


def test_a_running_job_without_a_worker_is_queued_again(database, settings, queue_job):
    job = queue_job()
    claim(database, lease_s=-1)
    before = len(unsent(database))

    assert reap_jobs(database, settings) == 1

    stored = read(database, job)
    assert (stored.status, stored.lease_owner, stored.publish_count) == ("queued", None, 0)
    assert len(unsent(database)) == before + 1
    with database.read() as session:
        assert session.get_one(JobAttempt, (job.id, 1)).outcome == "worker_lost"
        assert list_events(session, job.id)[-1].data == {"reason": "worker_lost"}


def test_a_job_that_lost_a_worker_on_every_attempt_fails(database, settings, queue_job):
    job = queue_job()
    for _ in range(3):
        claim(database, lease_s=-1)
        reap_jobs(database, settings)

    stored = read(database, job)
    assert (stored.status, stored.error["code"]) == ("failed", "worker_lost")
    assert claim(database) is None


def test_a_cancelling_job_without_a_worker_is_cancelled(database, settings, queue_job):
    job = queue_job()
    claim(database, lease_s=-1)
    cancel_job(database, job.tenant_id, job.id)

    reap_jobs(database, settings)

    assert read(database, job).status == JobStatus.CANCELLED


def test_the_reaper_leaves_a_job_alone_whose_worker_lives(database, settings, queue_job):
    job = queue_job()
    claim(database, lease_s=60)

    assert reap_jobs(database, settings) == 0
    assert read(database, job).status == JobStatus.RUNNING


def test_reaping_twice_is_reaping_once(database, settings, queue_job):
    job = queue_job()
    claim(database, lease_s=-1)
    reap_jobs(database, settings)
    version = read(database, job).version

    assert reap_jobs(database, settings) == 0
    assert read(database, job).version == version


def test_reapers_that_run_at_once_put_a_job_back_once(database, settings, queue_job):
    job = queue_job()
    claim(database, lease_s=-1)

    counts = run_at_once(*[partial(reap_jobs, database, settings)] * 4)

    assert sorted(counts) == [0, 0, 0, 1]
    with database.read() as session:
        kinds = [event.type for event in list_events(session, job.id)]
    assert kinds.count("job.requeued") == 1


def test_a_queued_job_is_announced_again_after_pauses_that_double_up_to_15_minutes(
    database, settings, queue_job
):
    job = queue_job()
    pauses_s = {1: 60, 2: 120, 3: 240, 4: 480, 5: 900, 6: 900, 40: 900}

    for count, pause_s in pauses_s.items():
        with database.write() as session:
            mark_sent(session, list_unsent(session, 10))
        date_back(database, job, pause_s - 5, count)
        assert reap_jobs(database, settings) == 0
        date_back(database, job, pause_s + 5, count)
        assert reap_jobs(database, settings) == 1
        assert unsent(database) == [job.id]
        # the broker may be down for long; one message that waits for it is enough
        assert reap_jobs(database, settings) == 0


def test_spent_messages_and_expired_keys_are_forgotten(database, settings, tenant_id, file_celery):
    request = RequestKey(key="k", method="POST", path="/", body_sha256="a")
    wanted = NewJob(model="a/b", revision=None, source_sha="f", spec={}, evaluation={})
    create_job(database, settings, tenant_id, wanted, request)
    relay_outbox(database, file_celery)
    with database.write() as session:
        old = database_now(session) - timedelta(days=2)
        session.execute(update(OutboxMessage).values(sent_at=old))
        session.execute(update(IdempotencyKey).values(expires_at=old))

    reap_jobs(database, settings)

    with database.read() as session:
        assert session.query(OutboxMessage).count() == 0
        assert session.query(IdempotencyKey).count() == 0


def test_a_second_failure_of_the_same_attempt_cannot_queue_the_job_twice(
    database, settings, queue_job
):
    job = queue_job()
    lease = claim(database, lease_s=-1).lease
    reap_jobs(database, settings)

    with pytest.raises(Exception, match="no longer holds"), database.write() as session:
        fail_job(session, lease, error={"code": "x", "message": "x", "layer": None}, retry=True)

    assert read(database, job).status == JobStatus.QUEUED


SEND_MANY = """
from api.queue import TaskName, create_celery
from api.settings import Settings

celery = create_celery(Settings())
for number in range(600):
    celery.send_task(TaskName.RUN_JOB, args=[str(number)])
"""


def test_a_reader_of_the_folder_never_meets_half_a_message(settings, file_celery):
    environment = os.environ | {"ABQ_DATA_DIR": str(settings.data_dir)}
    writer = subprocess.Popen([sys.executable, "-c", SEND_MANY], env=environment)
    taken = []

    with ending_after(writer, WAIT_S), file_celery.connection() as connection:
        queue = SimpleQueue(connection, QUEUE)
        while len(taken) < 600 and (writer.poll() is None or queue.qsize()):
            with suppress(queue.Empty):
                message = queue.get(block=False)
                taken.append(message.payload[0][0])
                message.ack()

    assert sorted(map(int, taken)) == list(range(600))


def test_files_and_redis_share_one_configuration(tmp_path, settings):
    files = create_celery(settings)
    redis = create_celery(with_queue(settings, broker_url="redis://127.0.0.1:1/0"))

    for app in (files, redis):
        assert app.conf.accept_content == ["json"]
        assert app.conf.task_acks_late is False
        assert app.conf.worker_prefetch_multiplier == 1
    options = files.conf.broker_transport_options
    assert options["data_folder_in"] == options["data_folder_out"]
    assert Path(options["control_folder"]).is_dir()
    assert redis.conf.worker_disable_prefetch is True


def test_settings_choose_the_broker(settings):
    chosen = settings.model_copy(update={"queue": QueueSettings(broker_url="amqp://host//")})

    assert create_celery(chosen).conf.broker_url == "amqp://host//"
