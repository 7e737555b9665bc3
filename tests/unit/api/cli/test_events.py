import json

import httpx
import pytest

from api.cli import events
from api.cli.client import ApiClient
from api.cli.errors import ServiceUnreachable
from api.cli.events import ServerEvent, follow_job, parse_server_events


def parsed(text):
    return list(parse_server_events(text.splitlines()))


def test_a_block_of_fields_is_one_event():
    assert parsed("id: 7\nevent: log\ndata: {}\n\n") == [ServerEvent(id="7", type="log", data="{}")]


def test_comments_are_no_events():
    assert parsed(": still here\n\n") == []


def test_a_block_without_its_end_is_no_event():
    assert parsed("id: 7\ndata: cut") == []


def test_data_lines_of_one_event_are_joined():
    assert parsed("data: a\ndata: b\n\n")[0].data == "a\nb"


def test_one_space_behind_the_colon_is_dropped_and_no_more():
    assert parsed("data:  a\n\n")[0].data == " a"


def block(number):
    record = {"id": str(number), "type": "log", "data": {"message": str(number)}}
    return f"id: {number}\nevent: log\ndata: {json.dumps(record)}\n\n"


class Service:
    """Answers requests for events, one text after the other; an int is a status."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.last_ids = []

    def __call__(self, request):
        self.last_ids.append(request.headers.get("Last-Event-ID"))
        answer = self.answers.pop(0)
        if isinstance(answer, int):
            return httpx.Response(answer, json={"detail": "not now"})
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(200, text=answer)


def follow(service, pauses):
    client = ApiClient("http://abq", "key", transport=httpx.MockTransport(service))
    return [event.id for event in follow_job(client, "job_1", pause=pauses.append)]


def test_a_stream_that_ends_early_is_opened_again_behind_its_last_event():
    service = Service(block(1) + block(2), block(3) + "event: done\ndata: {}\n\n")

    assert follow(service, []) == ["1", "2", "3"]
    assert service.last_ids == [None, "2"]


def test_the_pause_before_a_reconnect_is_the_services():
    pauses = []

    follow(Service("retry: 250\n\n" + block(1), "event: done\n\n"), pauses)

    assert pauses == [0.25]


def test_a_restarting_service_is_asked_again():
    pauses = []
    service = Service(block(1), httpx.ConnectError("refused"), 503, "event: done\n\n")

    assert follow(service, pauses) == ["1"]
    assert len(pauses) == 3


def test_a_service_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(events, "GIVE_UP_S", -1.0)

    with pytest.raises(ServiceUnreachable, match="abq watch job_1"):
        follow(Service(httpx.ConnectError("refused")), [])
