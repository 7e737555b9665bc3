import io

import pytest

from api.settings import InferenceSettings
from tests.fake_inference import START, run_fake_inference, token
from tests.running_api import run_api


@pytest.fixture
def inference():
    with run_fake_inference() as fake:
        yield fake


@pytest.fixture
def api(settings, database, inference):
    own = settings.model_copy(update={"inference": InferenceSettings(url=inference.url)})
    with run_api(own, database) as running:
        yield running


@pytest.fixture
def tiny(abq, api):
    """A hosted model called `tiny`."""
    job_id, _ = api.artifact()
    return abq("deploy", job_id, "--name", "tiny", "--json").json


def test_deploying_a_job_waits_until_its_model_answers(tiny):
    assert tiny["name"] == "tiny"
    assert tiny["status"] == "ready"


def test_an_artifact_is_deployed_by_its_own_id(abq, api):
    _, artifact_id = api.artifact()

    assert abq("deploy", "create", artifact_id, "--json").json["artifact_id"] == artifact_id


def test_a_list_shows_what_is_hosted(abq, tiny):
    shown = abq("deploy", "list")

    assert "tiny" in shown.out
    assert "ready" in shown.out


@pytest.mark.parametrize("field", ["id", "name"])
def test_a_deployment_is_deleted_by_id_or_name(abq, tiny, field):
    deleted = abq("deploy", "delete", tiny[field])

    assert deleted.code == 0
    assert abq("deploy", "list", "--json").json == []


def test_an_unfinished_job_is_not_deployed(abq, api):
    answer = abq("deploy", api.queue_job().id)

    assert answer.code == 1
    assert "queued" in answer.err


def test_one_question_streams_one_answer(abq, tiny, inference):
    options = ("--max-tokens", 7, "--temperature", 0, "--seed", 3, "--system", "Be brief.")

    answer = abq("chat", "tiny", "Who are you?", *options)

    asked = inference.requests[-1]
    assert answer.out == "Hello\n"
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert (asked["max_tokens"], asked["temperature"], asked["seed"]) == (7, 0, 3)


def test_an_answer_for_a_program_is_one_line_of_json(abq, tiny):
    answer = abq("chat", "tiny", "Who are you?", "--json").json

    assert answer["text"] == "Hello"
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


def test_a_conversation_remembers_what_was_said(abq, tiny, inference, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n\nnever asked\n"))

    answer = abq("chat", "tiny")

    said = [message["content"] for message in inference.requests[-1]["messages"]]
    assert answer.out == "Hello\nHello\n"
    assert said == ["first", "Hello", "second"]


def test_an_answer_that_breaks_off_is_exit_code_1(abq, tiny, inference):
    failure = {"type": "error", "code": "engine_error", "message": "out of memory", "param": None}
    inference.records = [START, token("Hel"), failure]

    answer = abq("chat", "tiny", "Who are you?")

    assert answer.code == 1
    assert answer.err.startswith("abq: the answer broke off")


def test_a_model_that_is_not_hosted_is_named(abq, inference):
    answer = abq("chat", "huge", "Who are you?")

    assert answer.code == 1
    assert "huge" in answer.err
    assert inference.requests == []
