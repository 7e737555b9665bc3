from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import update

from api.db.connection import database_now
from api.db.repositories.access import get_or_create_tenant
from api.db.repositories.events import list_events
from api.db.repositories.idempotency import RequestKey
from api.db.repositories.jobs import JobFilter, count_by_status
from api.db.repositories.leases import claim_job, fail_job, record_event
from api.db.repositories.outbox import list_unsent
from api.db.repositories.pages import Cursor
from api.db.tables.jobs import IdempotencyKey, Job, JobStatus
from api.errors import (
    IdempotencyMismatch,
    InvalidRequest,
    JobNotFound,
    JobStateConflict,
    QuotaExceeded,
)
from api.services.jobs import (
    NewJob,
    cancel_job,
    create_job,
    find_replayed_job,
    get_job,
    list_jobs,
    list_layers,
    retry_job,
)
from api.settings import LimitSettings
from tests.concurrency import run_at_once

WANTED = NewJob(
    model="acme/tiny",
    revision="main",
    source_sha="f" * 40,
    spec={"w_bits": 4},
    evaluation={"enabled": True},
    labels={"team": "research"},
)


def key(value="k1", body="a" * 64):
    return RequestKey(key=value, method="POST", path="/v1/quantizations", body_sha256=body)


@pytest.fixture
def other_tenant(database):
    with database.write() as session:
        return get_or_create_tenant(session, "other").id


def claim(database):
    with database.write() as session:
        return claim_job(session, worker="w", lease_s=60, free_vram_bytes=None)


def unsent(database):
    with database.read() as session:
        return [message.job_id for message in list_unsent(session, 1000)]


def test_a_created_job_is_queued_with_its_first_event_and_a_wake_up(database, settings, tenant_id):
    job = create_job(database, settings, tenant_id, WANTED)

    stored = get_job(database, tenant_id, job.id)
    assert (stored.status, stored.spec, stored.labels) == (
        "queued", {"w_bits": 4}, {"team": "research"},
    )  # fmt: skip
    assert (stored.report, stored.artifact_id, stored.max_attempts) == (None, None, 3)
    assert unsent(database) == [job.id]
    with database.read() as session:
        assert [event.type for event in list_events(session, job.id)] == ["job.queued"]


def test_a_refused_transaction_leaves_neither_job_nor_wake_up(
    database, settings, tenant_id, monkeypatch
):
    def refuse(*_):
        raise ConnectionError("the database went away")

    monkeypatch.setattr("api.services.jobs.submit_job", refuse)
    with pytest.raises(ConnectionError):
        create_job(database, settings, tenant_id, WANTED, key())

    assert unsent(database) == []
    assert list_jobs(database, tenant_id, JobFilter(), Cursor()).items == []
    assert find_replayed_job(database, tenant_id, key()) is None


def test_the_same_key_and_body_give_the_same_job(database, settings, tenant_id):
    first = create_job(database, settings, tenant_id, WANTED, key())
    second = create_job(database, settings, tenant_id, WANTED, key())

    assert second.id == first.id
    assert find_replayed_job(database, tenant_id, key()).id == first.id
    assert unsent(database) == [first.id]


def test_the_same_key_with_another_body_is_refused(database, settings, tenant_id):
    create_job(database, settings, tenant_id, WANTED, key())

    with pytest.raises(IdempotencyMismatch):
        create_job(database, settings, tenant_id, WANTED, key(body="b" * 64))
    with pytest.raises(IdempotencyMismatch):
        find_replayed_job(database, tenant_id, key(body="b" * 64))


def test_a_key_belongs_to_its_tenant(database, settings, tenant_id, other_tenant):
    mine = create_job(database, settings, tenant_id, WANTED, key())
    theirs = create_job(database, settings, other_tenant, WANTED, key(body="b" * 64))

    assert theirs.id != mine.id


def test_an_expired_key_creates_a_new_job(database, settings, tenant_id):
    first = create_job(database, settings, tenant_id, WANTED, key())
    with database.write() as session:
        past = database_now(session) - timedelta(seconds=1)
        session.execute(update(IdempotencyKey).values(expires_at=past))

    second = create_job(database, settings, tenant_id, WANTED, key(body="b" * 64))

    assert second.id != first.id
    assert find_replayed_job(database, tenant_id, key(body="b" * 64)).id == second.id


def test_equal_requests_in_parallel_create_one_job(database, settings, tenant_id):
    create = partial(create_job, database, settings, tenant_id, WANTED, key())

    created = {job.id for job in run_at_once(*[create] * 8)}

    assert len(created) == 1
    assert unsent(database) == list(created)


def test_a_tenant_cannot_exceed_its_quota_even_in_parallel(
    database, settings, tenant_id, other_tenant
):
    limited = settings.model_copy(update={"limits": LimitSettings(active_jobs=3)})

    def create():
        try:
            return create_job(database, limited, tenant_id, WANTED)
        except QuotaExceeded as refusal:
            return refusal

    results = run_at_once(*[create] * 8)

    created = [result for result in results if isinstance(result, Job)]
    refused = [result for result in results if isinstance(result, QuotaExceeded)]
    assert (len(created), len(refused)) == (3, 5)
    assert refused[0].extra["retry_after_s"] > 0
    create_job(database, limited, other_tenant, WANTED)
    cancel_job(database, tenant_id, created[0].id)
    create_job(database, limited, tenant_id, WANTED)


def test_a_queued_job_is_cancelled_at_once(database, tenant_id, queue_job):
    job = cancel_job(database, tenant_id, queue_job().id)

    assert job.status == JobStatus.CANCELLED
    assert job.cancelled_at is not None
    assert claim(database) is None


def test_a_running_job_is_asked_to_stop_and_asking_twice_changes_nothing(
    database, tenant_id, queue_job
):
    job = queue_job()
    claim(database)

    first = cancel_job(database, tenant_id, job.id)
    second = cancel_job(database, tenant_id, job.id)

    assert first.status == second.status == JobStatus.CANCELLING
    assert first.version == second.version
    with database.read() as session:
        kinds = [event.type for event in list_events(session, job.id)]
    assert kinds == ["job.queued", "job.started", "job.cancelling"]


def test_a_failed_job_cannot_be_cancelled_but_retried_with_a_new_budget(
    database, settings, tenant_id, queue_job
):
    job = queue_job()
    error = {"code": "calibration_diverged", "message": "NaN", "layer": "layers.0"}
    lease = claim(database).lease
    with database.write() as session:
        fail_job(session, lease, error=error, retry=False)

    with pytest.raises(JobStateConflict):
        cancel_job(database, tenant_id, job.id)
    retried = retry_job(database, settings, tenant_id, job.id)

    assert (retried.id, retried.status, retried.error) == (job.id, "queued", None)
    assert retried.failed_at is None
    assert retried.max_attempts - retried.attempt == 3
    assert claim(database).lease.attempt == 2


def test_a_cancelled_job_that_is_retried_runs_without_being_cancelled_again(
    database, settings, tenant_id, queue_job
):
    job = queue_job()
    cancel_job(database, tenant_id, job.id)

    retried = retry_job(database, settings, tenant_id, job.id)

    assert retried.cancel_requested_at is None
    assert claim(database).job.status == JobStatus.RUNNING


def test_a_job_that_has_not_ended_cannot_be_retried(database, settings, tenant_id, queue_job):
    job = queue_job()

    with pytest.raises(JobStateConflict, match="queued"):
        retry_job(database, settings, tenant_id, job.id)


def test_a_retry_counts_against_the_quota(database, settings, tenant_id, queue_job):
    limited = settings.model_copy(update={"limits": LimitSettings(active_jobs=1)})
    job = queue_job()
    cancel_job(database, tenant_id, job.id)
    queue_job()

    with pytest.raises(QuotaExceeded):
        retry_job(database, limited, tenant_id, job.id)


def test_another_tenants_job_is_as_if_it_did_not_exist(database, settings, other_tenant, queue_job):
    job = queue_job()

    for attempt in (
        lambda: get_job(database, other_tenant, job.id),
        lambda: cancel_job(database, other_tenant, job.id),
        lambda: retry_job(database, settings, other_tenant, job.id),
    ):
        with pytest.raises(JobNotFound):
            attempt()
    assert list_jobs(database, other_tenant, JobFilter(), Cursor()).items == []


def test_layers_are_read_in_the_order_of_the_model(database, tenant_id, other_tenant, queue_job):
    job = queue_job()
    lease = claim(database).lease
    with database.write() as session:
        for index in (10, 2, 0):
            started = {"index": index, "total": 12, "name": f"layers.{index}", "bits": {"q": 4}}
            record_event(session, lease, "layer.started", started)

    layers = list_layers(database, tenant_id, job.id)

    assert [layer.index for layer in layers] == [0, 2, 10]
    with pytest.raises(JobNotFound):
        list_layers(database, other_tenant, job.id)


def test_jobs_of_all_tenants_are_counted_in_every_status(database, other_tenant, queue_job):
    queue_job()
    queue_job(other_tenant)
    claim(database)

    with database.read() as session:
        counts = count_by_status(session)

    assert counts == dict.fromkeys(JobStatus, 0) | {JobStatus.QUEUED: 1, JobStatus.RUNNING: 1}


def test_pages_walk_all_jobs_newest_first_and_back(database, tenant_id, queue_job):
    newest_first = [queue_job().id for _ in range(5)][::-1]
    rows = list_jobs(database, tenant_id, JobFilter(), Cursor(limit=100)).items
    # two jobs of one millisecond are ordered by id
    newest_first.sort(key=[row.id for row in rows].index)
    assert [row.created_at for row in rows] == sorted(
        (row.created_at for row in rows), reverse=True
    )

    walked, cursor = [], Cursor(limit=2)
    while True:
        page = list_jobs(database, tenant_id, JobFilter(), cursor)
        walked += [row.id for row in page.items]
        if not page.has_more:
            break
        cursor = Cursor(after=walked[-1], limit=2)
    back = list_jobs(database, tenant_id, JobFilter(), Cursor(before=newest_first[3], limit=2))

    assert walked == newest_first
    assert [row.id for row in back.items] == newest_first[1:3]
    assert back.has_more


def test_a_list_is_filtered_by_status_model_and_labels(database, tenant_id, queue_job):
    plain = queue_job()
    labelled = queue_job(model="acme/big", labels={"team.name": "a b", "run": "7"})
    claim(database)

    def found(**wanted):
        page = list_jobs(database, tenant_id, JobFilter(**wanted), Cursor())
        return {row.id for row in page.items}

    assert found(status=JobStatus.RUNNING) == {plain.id}
    assert found(model="acme/big") == {labelled.id}
    assert found(labels={"team.name": "a b"}) == {labelled.id}
    assert found(labels={"team.name": "a b", "run": "8"}) == set()
    assert found(labels={"absent": "x"}) == set()


@pytest.mark.parametrize(
    ("cursor", "param"),
    [
        (Cursor(limit=0), "limit"),
        (Cursor(limit=101), "limit"),
        (Cursor(after="job_unknown"), "after"),
        (Cursor(before="job_unknown"), "before"),
        (Cursor(after="a", before="b"), "before"),
    ],
)
def test_a_wrong_cursor_is_refused_by_name(database, tenant_id, cursor, param):
    with pytest.raises(InvalidRequest) as refusal:
        list_jobs(database, tenant_id, JobFilter(), cursor)

    assert refusal.value.param == param


def test_a_label_with_a_quote_is_refused_and_not_run_as_a_path(database, tenant_id):
    with pytest.raises(InvalidRequest, match="quote"):
        list_jobs(database, tenant_id, JobFilter(labels={'a"b': "x"}), Cursor())
