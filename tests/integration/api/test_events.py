"""The story of a job over HTTP: as a list, and as a stream that survives its cuts."""

import json
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from sqlalchemy import event as sqlalchemy_event

EVENT_STREAM = {"Accept": "text/event-stream"}


@contextmanager
def follow(client, job_id, **request):
    """The frames of a stream, as they arrive: dicts of `id`, `event` and `data`."""
    headers = EVENT_STREAM | request.pop("headers", {})
    url = f"/v1/quantizations/{job_id}/events"
    with client.stream("GET", url, headers=headers, **request) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield read_frames(response.iter_lines())


def read_frames(lines):
    frame = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            frame[name] = value.strip()
        elif frame:
            yield frame
            frame = {}


def only_events(frames):
    return [each for each in frames if "id" in each]


def test_a_list_of_events_is_read_in_pages(api):
    job = api.queue_job()
    lease = api.claim()
    for number in range(5):
        api.record(lease, "log", level="info", message=str(number))

    with api.client("quant:read") as client:
        url = f"/v1/quantizations/{job.id}/events"
        first = client.get(url, params={"limit": 4}).json()
        second = client.get(url, params={"limit": 4, "after": first["last_id"]}).json()

    types = [each["type"] for each in first["data"] + second["data"]]
    assert types == ["job.queued", "job.started", *["log"] * 5]
    assert (first["has_more"], second["has_more"]) == (True, False)


def test_a_stream_tells_the_past_then_what_happens_and_ends_with_done(api):
    job = api.queue_job()
    with api.client() as client, follow(client, job.id) as frames:
        seen = [next(frames), next(frames)]
        lease = api.claim()
        api.record(lease, "stage.started", stage="calibrating")
        api.finish(lease)
        seen += list(frames)

    assert seen[0] == {"retry": "3000"}
    names = [each["event"] for each in seen[1:]]
    assert names == ["job.queued", "job.started", "stage.started", "job.succeeded", "done"]
    ids = [int(each["id"]) for each in only_events(seen)]
    assert ids == sorted(set(ids))
    assert json.loads(seen[3]["data"])["data"] == {"stage": "calibrating"}
    # the last frame has no id: a client that comes back is told again that it is over
    assert "id" not in seen[-1]
    assert json.loads(seen[-1]["data"]) == {"status": "succeeded"}


def test_a_stream_of_a_finished_job_ends_at_once(api):
    job_id, _ = api.artifact()

    with api.client() as client, follow(client, job_id) as frames:
        last_id = only_events(frames)[-1]["id"]
    with api.client() as client:
        headers = {"Last-Event-ID": last_id}
        with follow(client, job_id, headers=headers) as frames:
            again = list(frames)

    assert [each.get("event") for each in again] == [None, "done"]


def test_a_cut_stream_goes_on_without_gap_and_without_duplicate(api):
    job = api.queue_job()
    lease = api.claim()
    writer = threading.Thread(target=write_slowly, args=(api, lease, 60))
    writer.start()

    seen, last_id, cuts = [], None, 0
    with api.client() as client:
        while "job.succeeded" not in [each["event"] for each in seen]:
            headers = {"Last-Event-ID": last_id} if last_id else {}
            with follow(client, job.id, headers=headers) as frames:
                for frame in frames:
                    if "id" in frame:
                        seen.append(frame)
                        last_id = frame["id"]
                        if len(seen) % 7 == 0:
                            cuts += 1
                            break
        listed = client.get(f"/v1/quantizations/{job.id}/events", params={"limit": 1000}).json()
    writer.join()

    assert cuts > 3
    assert [each["id"] for each in seen] == [each["id"] for each in listed["data"]]


def test_after_in_the_address_does_what_the_header_does(api):
    job_id, _ = api.artifact()
    with api.client() as client:
        listed = client.get(f"/v1/quantizations/{job_id}/events").json()["data"]

        with follow(client, job_id, params={"after": listed[0]["id"]}) as frames:
            seen = only_events(frames)

    assert [each["id"] for each in seen] == [each["id"] for each in listed[1:]]


@pytest.mark.parametrize("given", ["-1", "x", str(2**63)])
def test_an_event_id_that_is_none_is_refused(shared_api, given):
    job = shared_api.queue_job()

    with shared_api.client() as client:
        url = f"/v1/quantizations/{job.id}/events"
        response = client.get(url, headers={"Last-Event-ID": given})

    assert response.status_code == 422
    assert response.json()["param"] == "last-event-id"


def test_many_watchers_cost_no_more_queries_than_one(api):
    job = api.queue_job()
    queries = []
    sqlalchemy_event.listen(
        api.database.engine, "before_cursor_execute", lambda *args: queries.append(args[2])
    )

    costs = []
    for watchers in (1, 12):
        with api.client() as client, ExitStack() as streams:
            for _ in range(watchers):
                frames = streams.enter_context(follow(client, job.id))
                # its past is read once by each watcher; what counts is the time after that
                assert only_events([next(frames), next(frames)]) != []
            time.sleep(0.3)
            before = len(queries)
            time.sleep(1.5)
            costs.append(len([each for each in queries[before:] if "job_events" in each]))

    # four rounds a second of one query; twelve loops would make 72
    assert min(costs) > 0
    assert max(costs) <= 10


def test_a_waiting_stream_sends_comments(api, monkeypatch):
    monkeypatch.setattr("api.routes.events.HEARTBEAT_S", 0.1)
    job = api.queue_job()

    with (
        api.client() as client,
        client.stream(
            "GET", f"/v1/quantizations/{job.id}/events", headers=EVENT_STREAM
        ) as response,
    ):
        lines = response.iter_lines()
        comment = next(line for line in lines if line.startswith(":"))

    assert comment == ": still here"


def write_slowly(api, lease, count):
    for number in range(count):
        api.record(lease, "log", level="info", message=str(number))
        time.sleep(0.02)
    api.finish(lease)
