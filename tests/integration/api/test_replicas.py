"""One API in front of several inference services, and what it lets one key do at once."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from api.db.connection import Database
from api.services import replica
from api.settings import InferenceSettings, LimitSettings, Settings
from tests.fake_inference import END, FINISH, START, run_fake_inference, token
from tests.integration.api.conftest import closed_address
from tests.integration.machine import wait_until
from tests.running_api import run_api

URL = "/v1/chat/completions"
CHAT = {"model": "hosted", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}
AT_ONCE = 4


@pytest.fixture(scope="module")
def fakes():
    with run_fake_inference() as first, run_fake_inference() as second:
        yield first, second


@pytest.fixture(scope="module")
def served(tmp_path_factory, sqlite_template, fakes):
    """An API with three services, one of which never answers."""
    folder = tmp_path_factory.mktemp("replicas")
    shutil.copyfile(sqlite_template, folder / "abq.db")
    urls = (closed_address(), *(fake.url for fake in fakes))
    settings = Settings(
        data_dir=folder,
        inference=InferenceSettings(url=urls[0], replica_urls=urls[1:], load_timeout_s=20),
        limits=LimitSettings(key_requests=AT_ONCE, key_tokens_per_minute=1000),
    )
    database = Database(settings.database_url)
    with run_api(settings, database) as api:
        yield api
    database.close()


@pytest.fixture
def replicas(fakes, monkeypatch):
    # what one test is told of a load must not decide another one's routes
    monkeypatch.setattr(replica, "LOAD_AGE_S", 0.0)
    for fake in fakes:
        fake.reset()
    return fakes


@pytest.fixture
def client(served, replicas):
    tenant = uuid4().hex
    job_id, _ = served.artifact(tenant)
    with served.client(tenant=tenant) as opened:
        opened.post("/v1/deployments", json={"quantization_id": job_id, "name": "hosted"})
        yield opened


def events(response):
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [line.removeprefix("data: ") for line in lines]


def asked(replicas):
    return [len(each.requests) for each in replicas]


def at_once(client, count):
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: client.post(URL, json=CHAT), range(count)))


def test_a_model_is_loaded_by_every_service_that_answers(client, replicas):
    (deployment,) = client.get("/v1/deployments").json()["data"]

    assert [each.loaded for each in replicas] == [[deployment["artifact_id"]]] * 2
    assert (deployment["status"], deployment["replicas"]) == ("ready", 2)
    assert deployment["memory_bytes"] == 2000


def test_requests_at_once_go_to_the_least_busy(client, replicas):
    for each in replicas:
        each.pause_s = 0.1

    answers = at_once(client, AT_ONCE)

    assert [each.status_code for each in answers] == [200] * AT_ONCE
    assert asked(replicas) == [AT_ONCE // 2] * 2


def test_a_service_that_is_busy_for_others_is_spared(client, replicas, monkeypatch):
    monkeypatch.setattr(replica, "LOAD_AGE_S", 30.0)
    replicas[0].load = 50

    for _ in range(6):
        client.post(URL, json=CHAT)

    # once it has told, nothing comes any more
    assert asked(replicas)[0] <= 1


@pytest.mark.parametrize("wanted", [CHAT, STREAM])
@pytest.mark.parametrize("fault", ["full", "broke off"])
def test_before_the_first_token_another_service_goes_on(client, replicas, wanted, fault):
    if fault == "full":
        body = {"type": "error", "code": "overloaded", "message": "full", "param": None}
        replicas[0].refusal = (503, body, {"Retry-After": "7"})
    else:
        replicas[0].records = [START]

    answers = [client.post(URL, json=wanted) for _ in range(2)]

    assert [each.status_code for each in answers] == [200, 200]
    # of two requests in turn at least one begins with the service that fails
    assert asked(replicas)[0] >= 1
    assert asked(replicas)[1] == 2
    for answer in answers:
        if wanted is STREAM:
            deltas = [json.loads(each)["choices"][0]["delta"] for each in events(answer)[:-1]]
            assert deltas == [
                {"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {},
            ]  # fmt: skip
        else:
            assert answer.json()["choices"][0]["message"]["content"] == "Hello"


def test_behind_the_first_token_nothing_is_begun_again(client, replicas):
    for each in replicas:
        each.records = [START, token("Hel")]

    streamed = events(client.post(URL, json=STREAM))
    whole = client.post(URL, json=CHAT)

    assert sum(asked(replicas)) == 2
    assert json.loads(streamed[-2])["choices"][0]["delta"] == {"content": "Hel"}
    assert json.loads(streamed[-1])["error"]["code"] == "inference_unavailable"
    assert whole.status_code == 503


def test_what_one_service_refuses_for_good_no_other_is_asked(client, replicas):
    for each in replicas:
        body = {"code": "context_length_exceeded", "message": "too long", "param": "max_tokens"}
        each.refusal = (400, body, {})

    refused = client.post(URL, json=CHAT)

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert sum(asked(replicas)) == 1


def test_when_all_are_full_the_caller_is_told_when_to_come_back(client, replicas):
    for each in replicas:
        body = {"type": "error", "code": "overloaded", "message": "full", "param": None}
        each.refusal = (503, body, {"Retry-After": "7"})

    refused = client.post(URL, json=CHAT)

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "7"
    assert asked(replicas) == [1, 1]


def test_an_id_goes_with_a_request_all_the_way(client, replicas):
    answer = client.post(URL, json=CHAT, headers={"X-Request-Id": "trace-9"})

    (headers,) = [each for replica in replicas for each in replica.headers]
    assert answer.headers["x-request-id"] == headers["x-request-id"] == "trace-9"


def test_a_key_with_too_much_at_once_is_429_and_others_are_served(client, served, replicas):
    for each in replicas:
        each.delay_s = 0.5

    answers = at_once(client, AT_ONCE + 2)
    statuses = sorted(each.status_code for each in answers)
    refused = next(each for each in answers if each.status_code == 429)

    assert statuses == [200] * AT_ONCE + [429] * 2
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    # the running ones have ended: there is room again
    assert client.post(URL, json=CHAT).status_code == 200


def test_tokens_are_paid_for_whether_the_answer_was_read_or_not(client, replicas):
    for each in replicas:
        each.records = [START | {"prompt_tokens": 900}, token("x", tokens=600), token("y")]
        each.records += [token("z")] * 200 + [FINISH, END]
        each.pause_s = 0.05

    with client.stream("POST", URL, json=STREAM) as response:
        lines = response.iter_lines()
        while '"x"' not in next(lines):
            pass
    wait_until(lambda: sum(each.cancelled for each in replicas) == 1, "it was not cancelled", 5)
    time.sleep(0.1)
    refused = client.post(URL, json=CHAT)

    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "1000 tokens a minute" in refused.json()["error"]["message"]
    assert 0 < int(refused.headers["retry-after"]) <= 60


def test_a_reader_that_is_slow_holds_nothing_up_but_himself(client, replicas):
    text = "word " * 20_000
    for each in replicas:
        each.records = [START, *[token(text)] * 400, FINISH, END]

    with client.stream("POST", URL, json=STREAM) as response:
        lines = response.iter_lines()
        next(lines)
        # forty megabytes lie before the reader: the service is not read faster than he reads
        time.sleep(0.5)
        sent = sum(each.sent for each in replicas)
        other = client.post(URL, json=CHAT | {"model": "none"})
        rest = sum(1 for _ in lines)

    assert sent < 400
    assert other.status_code == 404
    assert rest > 800
    wait_until(lambda: sum(each.finished for each in replicas) == 1, "it did not end", 5)
