import threading
from datetime import timedelta
from functools import partial
from itertools import chain

import pytest
from sqlalchemy import update

from api.db.base import new_id
from api.db.connection import database_now
from api.db.repositories.artifacts import artifact_of_job, list_files
from api.db.repositories.events import list_events
from api.db.repositories.jobs import get_job, list_layers
from api.db.repositories.leases import (
    LeaseLost,
    cancel_job_finished,
    claim_job,
    complete_job,
    fail_job,
    record_event,
    release_job,
    renew_lease,
)
from api.db.tables.artifacts import Artifact, ArtifactFile
from api.db.tables.jobs import Job, JobAttempt, JobStatus
from api.services.jobs import cancel_job
from tests.concurrency import run_at_once

OUT_OF_MEMORY = {"code": "out_of_memory", "message": "killed", "layer": None}


@pytest.fixture
def claim(database):
    def as_worker(worker="worker-1", free_vram_bytes=None):
        with database.write() as session:
            return claim_job(session, worker=worker, lease_s=60, free_vram_bytes=free_vram_bytes)

    return as_worker


@pytest.fixture
def expire(database):
    def lease_of(job_id):
        with database.write() as session:
            past = database_now(session) - timedelta(seconds=1)
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=past))

    return lease_of


def read(database, job):
    with database.read() as session:
        return get_job(session, job.tenant_id, job.id)


def story(database, job):
    with database.read() as session:
        return [event.type for event in list_events(session, job.id)]


def attempts(database, job):
    with database.read() as session:
        rows = session.query(JobAttempt).filter_by(job_id=job.id).order_by(JobAttempt.attempt)
        return [(row.attempt, row.worker, row.outcome) for row in rows]


def artifact_for(job):
    artifact = Artifact(
        id=new_id("art"),
        tenant_id=job.tenant_id,
        job_id=job.id,
        manifest_sha256="a" * 64,
        bytes=12,
        bits_per_weight=4.1,
        summary={"spec": {}},
        created_at=job.created_at,
    )
    file = ArtifactFile(artifact_id=artifact.id, path="config.json", bytes=12, sha256="b" * 64)
    return artifact, [file]


def test_a_claimed_job_runs_with_the_name_of_its_worker(database, queue_job, claim):
    job = queue_job()

    claimed = claim("worker-7")

    assert claimed.lease.job_id == job.id
    stored = read(database, job)
    assert (stored.status, stored.lease_owner, stored.attempt) == ("running", "worker-7", 1)
    assert stored.started_at is not None
    assert attempts(database, job) == [(1, "worker-7", None)]
    assert story(database, job) == ["job.queued", "job.started"]


def test_nothing_is_claimed_from_an_empty_queue(claim):
    assert claim() is None


def test_a_claimed_job_is_not_claimed_again(queue_job, claim):
    queue_job()
    claim("worker-1")

    assert claim("worker-2") is None


@pytest.mark.parametrize("jobs", [1, 3])
def test_of_many_workers_that_claim_at_once_each_job_goes_to_one(queue_job, claim, jobs):
    expected = {queue_job().id for _ in range(jobs)}

    def claim_some(name):
        return [claim(name) for _ in range(jobs)]

    claims = run_at_once(*(partial(claim_some, f"w{number}") for number in range(8)))

    won = [each.lease.job_id for each in chain(*claims) if each is not None]
    assert sorted(won) == sorted(expected)


def test_a_job_that_needs_more_memory_than_there_is_waits_for_another_worker(queue_job, claim):
    queue_job(need_vram_bytes=80)
    small = queue_job(need_vram_bytes=20)

    assert claim(free_vram_bytes=24).lease.job_id == small.id
    assert claim(free_vram_bytes=24) is None


def test_a_higher_priority_goes_before_an_older_job(queue_job, claim):
    queue_job()
    urgent = queue_job(priority=1)

    assert claim().lease.job_id == urgent.id


def test_an_expired_lease_passes_to_the_next_worker_and_the_old_one_can_write_nothing(
    database, queue_job, claim, expire
):
    job = queue_job()
    lost = claim("worker-1").lease
    expire(job.id)

    taken = claim("worker-2").lease

    assert (taken.job_id, taken.attempt) == (job.id, 2)
    assert attempts(database, job) == [(1, "worker-1", "worker_lost"), (2, "worker-2", None)]
    writes = [
        lambda session: renew_lease(session, lost, 60),
        lambda session: record_event(session, lost, "log", {"message": "still here"}),
        lambda session: fail_job(session, lost, error=OUT_OF_MEMORY, retry=True),
        lambda session: cancel_job_finished(session, lost),
        lambda session: release_job(session, lost),
    ]
    for write in writes:
        with pytest.raises(LeaseLost), database.write() as session:
            write(session)
    assert read(database, job).lease_owner == "worker-2"
    assert "log" not in story(database, job)


def test_the_lease_of_an_earlier_attempt_is_no_good_for_the_same_worker(
    database, queue_job, claim, expire
):
    job = queue_job()
    lost = claim("worker-1").lease
    expire(job.id)
    claim("worker-1")

    with pytest.raises(LeaseLost), database.write() as session:
        renew_lease(session, lost, 60)


def test_a_lost_lease_leaves_no_artifact_behind(database, queue_job, claim, expire):
    job = queue_job()
    lost = claim("worker-1").lease
    expire(job.id)
    claim("worker-2")
    artifact, files = artifact_for(job)

    with pytest.raises(LeaseLost), database.write() as session:
        complete_job(session, lost, report={}, artifact=artifact, files=files)

    with database.read() as session:
        assert session.query(Artifact).count() == 0


def test_a_renewed_lease_lasts_longer_and_tells_of_a_cancel(database, queue_job, claim):
    job = queue_job()
    lease = claim().lease
    before = read(database, job).lease_until

    with database.write() as session:
        assert renew_lease(session, lease, 600) is False
    assert read(database, job).lease_until > before + timedelta(seconds=400)

    cancel_job(database, job.tenant_id, job.id)
    with database.write() as session:
        assert renew_lease(session, lease, 60) is True


def test_a_finished_job_has_its_report_and_its_artifact(database, queue_job, claim):
    job = queue_job()
    lease = claim().lease
    artifact, files = artifact_for(job)

    with database.write() as session:
        complete_job(
            session, lease, report={"bits_per_weight": 4.1}, artifact=artifact, files=files
        )

    stored = read(database, job)
    assert (stored.status, stored.artifact_id) == ("succeeded", artifact.id)
    assert stored.report == {"bits_per_weight": 4.1}
    assert (stored.lease_owner, stored.lease_until) == (None, None)
    assert story(database, job)[-1] == "job.succeeded"
    assert attempts(database, job) == [(1, "worker-1", "succeeded")]
    with database.read() as session:
        found = artifact_of_job(session, job.tenant_id, job.id)
        assert [file.path for file in list_files(session, found.id)] == ["config.json"]


def test_a_failure_that_may_pass_is_tried_until_the_attempts_are_used_up(
    database, queue_job, claim
):
    job = queue_job()
    outcomes = []

    for _ in range(3):
        lease = claim().lease
        with database.write() as session:
            outcomes.append(fail_job(session, lease, error=OUT_OF_MEMORY, retry=True))

    assert outcomes == [JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.FAILED]
    assert claim() is None
    stored = read(database, job)
    assert (stored.status, stored.error) == ("failed", OUT_OF_MEMORY)
    assert story(database, job).count("job.requeued") == 2
    assert [outcome for _, _, outcome in attempts(database, job)] == ["out_of_memory"] * 3


def test_a_failure_that_will_not_pass_fails_the_job_at_once(database, queue_job, claim):
    job = queue_job()
    error = {"code": "calibration_diverged", "message": "loss is NaN", "layer": "layers.3"}
    lease = claim().lease
    with database.write() as session:
        record_event(session, lease, "stage.started", {"stage": "calibrating"})

    with database.write() as session:
        fail_job(session, lease, error=error, retry=False)

    stored = read(database, job)
    assert (stored.status, stored.stage, stored.error) == ("failed", "calibrating", error)
    assert claim() is None


def test_a_job_that_dies_while_it_is_cancelled_is_cancelled_and_not_tried_again(
    database, queue_job, claim
):
    job = queue_job()
    lease = claim().lease
    cancel_job(database, job.tenant_id, job.id)

    with database.write() as session:
        assert fail_job(session, lease, error=OUT_OF_MEMORY, retry=True) == JobStatus.CANCELLED

    assert story(database, job)[-1] == "job.cancelled"


def test_a_cancelled_job_ends_when_its_worker_says_that_nothing_runs_any_more(
    database, queue_job, claim
):
    job = queue_job()
    lease = claim().lease
    cancel_job(database, job.tenant_id, job.id)
    assert read(database, job).status == JobStatus.CANCELLING

    with database.write() as session:
        cancel_job_finished(session, lease)

    stored = read(database, job)
    assert (stored.status, stored.lease_owner) == ("cancelled", None)
    assert attempts(database, job) == [(1, "worker-1", "cancelled")]
    assert claim() is None


def test_a_worker_that_shuts_down_while_it_cancels_ends_the_job(database, queue_job, claim):
    job = queue_job()
    lease = claim().lease
    cancel_job(database, job.tenant_id, job.id)

    with database.write() as session:
        release_job(session, lease)

    assert read(database, job).status == JobStatus.CANCELLED


def test_a_cancel_that_comes_after_the_work_is_done_does_not_throw_it_away(
    database, queue_job, claim
):
    job = queue_job()
    lease = claim().lease
    cancel_job(database, job.tenant_id, job.id)
    artifact, files = artifact_for(job)

    with database.write() as session:
        complete_job(session, lease, report={}, artifact=artifact, files=files)

    assert read(database, job).status == JobStatus.SUCCEEDED


def test_an_orderly_shutdown_costs_no_attempt(database, queue_job, claim):
    job = queue_job()

    for _ in range(4):
        lease = claim().lease
        with database.write() as session:
            release_job(session, lease)

    stored = read(database, job)
    assert stored.status == "queued"
    assert stored.max_attempts - stored.attempt == 3
    assert claim() is not None


def test_events_of_the_engine_fold_into_stage_progress_and_layers(database, queue_job, claim):
    job = queue_job()
    lease = claim().lease
    version = read(database, job).version
    finished = {
        "index": 0, "total": 2, "name": "model.layers.0", "loss_before": 0.5, "loss_after": 0.25,
        "seconds": 1.5, "memory_bytes": 1024, "resumed": False,
    }  # fmt: skip
    events = [
        ("stage.started", {"stage": "downloading"}),
        ("download.progress", {"bytes": 5, "total": 10}),
        ("stage.started", {"stage": "calibrating"}),
        ("layer.started", {"index": 0, "total": 2, "name": "model.layers.0", "bits": {"q": 3}}),
        ("layer.finished", finished),
        ("stage.started", {"stage": "evaluating"}),
        ("progress", {"stage": "evaluating", "done": 3, "total": 8, "unit": "windows"}),
        ("eval.result", {"metric": "perplexity", "fp": 1.0, "quant": 1.1, "tokens": 9}),
    ]

    ids, states = [], []
    for kind, data in events:
        with database.write() as session:
            ids.append(record_event(session, lease, kind, data))
        stored = read(database, job)
        states.append((stored.stage, stored.progress))

    assert ids == sorted(set(ids))
    assert states == [
        ("downloading", None),
        ("downloading", {"done": 5, "total": 10, "unit": "bytes"}),
        ("calibrating", None),
        ("calibrating", {"done": 0, "total": 2, "unit": "layers"}),
        ("calibrating", {"done": 1, "total": 2, "unit": "layers"}),
        ("evaluating", None),
        ("evaluating", {"done": 3, "total": 8, "unit": "windows"}),
        ("evaluating", {"done": 3, "total": 8, "unit": "windows"}),
    ]
    assert read(database, job).version == version + len(events)
    with database.read() as session:
        (layer,) = list_layers(session, job.id)
    assert (layer.name, layer.bits, layer.loss_after) == ("model.layers.0", {"q": 3}, 0.25)


def test_text_that_postgres_cannot_hold_does_not_end_the_job(database, queue_job, claim):
    job = queue_job()
    lease = claim().lease
    message = "tensor \x00 of \\u0000"

    with database.write() as session:
        record_event(session, lease, "log", {"level": "warning", "lines": [message]})
    with database.write() as session:
        error = {"code": "engine_error", "message": message, "layer": None}
        fail_job(session, lease, error=error, retry=False)

    expected = "tensor \ufffd of \\u0000"
    with database.read() as session:
        events = {event.type: event.data for event in list_events(session, job.id)}
    assert events["log"] == {"level": "warning", "lines": [expected]}
    assert read(database, job).error["message"] == expected


def test_a_layer_that_is_done_again_keeps_only_its_latest_result(database, queue_job, claim):
    job = queue_job()
    lease = claim().lease
    result = {"index": 1, "total": 2, "name": "model.layers.1", "loss_before": 0.5,
              "seconds": 1.0, "memory_bytes": 1}  # fmt: skip

    with database.write() as session:
        record_event(session, lease, "layer.finished", result | {"loss_after": 0.3})
        record_event(
            session, lease, "layer.finished", result | {"loss_after": 0.2, "resumed": True}
        )

    with database.read() as session:
        (layer,) = list_layers(session, job.id)
    assert (layer.loss_after, layer.resumed) == (0.2, True)


def test_a_reader_misses_no_event_that_is_written_while_it_reads(database, queue_job, claim):
    job = queue_job()
    lease = claim().lease
    is_written = threading.Event()

    def write():
        for number in range(15):
            with database.write() as session:
                record_event(session, lease, "log", {"level": "info", "message": str(number)})

    def write_and_tell():
        run_at_once(*[write] * 4)
        is_written.set()

    def follow():
        seen = [0]
        while not is_written.is_set():
            with database.read() as session:
                seen += [event.id for event in list_events(session, job.id, seen[-1])]
        with database.read() as session:
            return seen[1:] + [event.id for event in list_events(session, job.id, seen[-1])]

    _, seen = run_at_once(write_and_tell, follow)

    with database.read() as session:
        assert seen == [event.id for event in list_events(session, job.id)]
    assert len(seen) == 62
    assert read(database, job).version == 62
