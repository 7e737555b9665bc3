import pytest

from api.cli.client import ApiClient
from api.cli.errors import ApiProblem
from api.cli.events import follow_job
from tests.cutting_proxy import run_cutting_proxy


def test_a_finished_job_is_told_from_its_start(abq, api):
    job_id, _ = api.artifact()

    answer = abq("watch", job_id, "--json")

    *events, job = answer.lines
    assert answer.code == 0
    assert [event["type"] for event in events] == ["job.queued", "job.started", "job.succeeded"]
    assert job["status"] == "succeeded"


def test_a_failed_job_is_exit_code_1_with_its_reason(abq, api):
    job = api.queue_job()
    abq("jobs", "cancel", job.id)

    answer = abq("watch", job.id)

    assert answer.code == 1
    assert "cancelled" in answer.out


def test_a_pipe_gets_one_line_an_event(abq, api):
    job = api.queue_job()
    lease = api.claim()
    api.record(lease, "stage.started", stage="calibrating")
    losses = {"loss_before": 0.5, "loss_after": 0.25, "seconds": 1.5, "memory_bytes": 1000}
    api.record(
        lease, "layer.finished", index=0, total=2, name="model.layers.0", resumed=False, **losses
    )
    api.finish(lease)

    said = abq("watch", job.id).err

    assert "calibrating" in said
    assert "1/2  loss 0.5 -> 0.25" in said


def test_events_arrive_while_the_job_runs(api):
    job = api.queue_job()
    lease = api.claim()
    seen = []
    with ApiClient(api.url, api.key()) as client:
        for event in follow_job(client, job.id):
            seen.append(event.type)
            if event.type == "job.started":
                api.record(lease, "stage.started", stage="calibrating")
            if event.type == "stage.started":
                api.finish(lease)

    assert seen == ["job.queued", "job.started", "stage.started", "job.succeeded"]


def test_a_cut_stream_goes_on_without_gap_or_repetition(api):
    job = api.queue_job()
    lease = api.claim()
    for number in range(200):
        api.record(lease, "log", level="info", message=f"line {number}")
    api.finish(lease)
    pauses = []
    with run_cutting_proxy(api.url) as proxy, ApiClient(proxy.url, api.key()) as client:
        # in the middle of an event, twice, and once before a byte of the answer
        proxy.cuts[:] = [9_000, 0, 21_003]
        events = list(follow_job(client, job.id, on_reconnect=pauses.append, pause=lambda _: None))

    ids = [int(event.id) for event in events]
    lines = [event.data["message"] for event in events if event.type == "log"]
    assert ids == sorted(set(ids))
    assert lines == [f"line {number}" for number in range(200)]
    assert len(pauses) == 3
    assert b"last-event-id" in proxy.requests[-1].lower()


def test_an_unknown_job_is_not_asked_for_again(api):
    with ApiClient(api.url, api.key()) as client, pytest.raises(ApiProblem):
        next(follow_job(client, "job_unknown"))
