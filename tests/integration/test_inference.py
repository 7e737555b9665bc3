"""The inference process as its callers meet it: over HTTP, with real models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
from pydantic import SecretStr

from api.cli.environment import settings_environment
from api.settings import InferenceSettings, Settings, StorageSettings
from engine.calibration.watch import Watch
from engine.errors import NoTokenDrawn
from engine.inference.answer import Answer
from engine.inference.engine import EngineOptions
from engine.pipeline import EvaluationPlan, QuantJob, quantize_model
from engine.spec import CalibrationSpec, QuantSpec, Recipe
from tests.integration.machine import ROOT, wait_until
from tests.servers import free_port
from tests.tiny_llama import save_tiny_llama
from worker.inference.artifacts import ArtifactFolder

HEADER = "X-ABQ-Internal-Token"
TOKEN = "sesame"  # noqa: S105 - of a process that lives for a test
CONTEXT = 4096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    job = QuantJob(
        source_dir=save_tiny_llama(folder / "source", layers=2, positions=CONTEXT),
        out_dir=folder / "out",
        state_dir=folder / "state",
        spec=QuantSpec(
            w_bits=4,
            a_bits=8,
            recipe=Recipe.RTN,
            calibration=CalibrationSpec(samples=1, length=16, epochs=0),
        ),
        evaluation=EvaluationPlan(enabled=False),
    )
    quantize_model(job, Watch(on_event=lambda event: None))
    return job.out_dir


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory):
    """Copies of one model, one of them damaged, and one that claims to be very large."""
    root = tmp_path_factory.mktemp("artifacts")
    for name in ("art_a", "art_b", "art_c", "art_damaged", "art_large"):
        shutil.copytree(checkpoint, root / name)
    shard = next((root / "art_damaged").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    manifest = root / "art_large" / "abq_manifest.json"
    record = json.loads(manifest.read_text())
    record["bits"]["packed_bytes"] = 10**15
    manifest.write_text(json.dumps(record))
    return root


@contextmanager
def run_inference(store, **fields):
    """Start the process and give it and a client; keywords replace inference settings."""
    url = f"http://127.0.0.1:{free_port()}"
    given = InferenceSettings(url=url, token=SecretStr(TOKEN), threads=1, device="cpu", **fields)
    settings = Settings(data_dir=store.parent, storage=StorageSettings(root=store), inference=given)
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.inference"],
        cwd=ROOT,
        env={**settings_environment(settings, os.environ), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=url, headers={HEADER: TOKEN}, timeout=60) as client:
            wait_until(lambda: answers(client), "the inference process did not start")
            yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(store):
    """Of one process for most tests; what it is sent must not stop it."""
    with run_inference(store, max_waiting=0, max_running=4) as (_, client):
        yield client


def answers(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def generate(client, artifact_id="art_a", **fields):
    body = {"artifact_id": artifact_id, "prompts": ["hello"], "max_tokens": 4, "ignore_eos": True}
    return client.post("/generate", json={**body, **fields})


def records(response):
    return [json.loads(line) for line in response.text.splitlines()]


def text_of(response, index=0):
    """The text of one answer, in however many pieces it came."""
    pieces = [each for each in records(response) if each["type"] == "token"]
    return "".join(each["text"] for each in pieces if each["index"] == index)


class Stream:
    """A generation that takes its time, read in a thread."""

    def __init__(self, client, artifact_id="art_a", max_tokens=CONTEXT - 10):
        self.lines = []
        self.is_over = threading.Event()
        self._leave = threading.Event()
        arguments = (client, artifact_id, max_tokens)
        threading.Thread(target=self._read, args=arguments, daemon=True).start()
        wait_until(lambda: len(self.lines) > 1 or self.is_over.is_set(), "no token came")

    def disconnect(self):
        self._leave.set()
        self.is_over.wait(10)

    def _read(self, client, artifact_id, max_tokens):
        body = {
            "artifact_id": artifact_id,
            "prompts": ["hello"],
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
        try:
            with client.stream("POST", "/generate", json=body) as response:
                for line in response.iter_lines():
                    self.lines.append(json.loads(line))
                    if self._leave.is_set():
                        break
        finally:
            self.is_over.set()


def samples(client):
    """Metrics of `art_a` by name and by labels other than the model's."""
    found = {}
    for line in client.get("/metrics", headers={HEADER: ""}).text.splitlines():
        name, _, rest = line.partition("{")
        if line.startswith("#") or 'artifact_id="art_a"' not in rest:
            continue
        labels, _, value = rest.rpartition("} ")
        assert 'w_bits="4"' in labels
        assert 'a_bits="8"' in labels
        assert 'model_name="' in labels
        own = [
            each for each in labels.split(",") if each.split("=")[0] in {"le", "finished_reason"}
        ]
        found[name + (f"{{{','.join(own)}}}" if own else "")] = float(value)
    return found


def status_of(client, artifact_id):
    models = {each["artifact_id"]: each["status"] for each in client.get("/models").json()}
    return models.get(artifact_id)


def test_a_model_is_loaded_on_demand_and_generates(client):
    response = generate(client, seed=1)

    first, *tokens, finish, last = records(response)
    assert first == {"type": "start", "prompt_tokens": 5}
    assert {(record["type"], record["index"]) for record in tokens} == {("token", 0)}
    assert tokens[-1]["tokens"] == 4
    assert finish == {"type": "finish", "index": 0, "finish_reason": "length", "tokens": 4}
    assert last == {
        "type": "end", "prompt_tokens": 5, "completion_tokens": 4, "cached_tokens": 0
    }  # fmt: skip
    assert status_of(client, "art_a") == "ready"


def test_equal_seeds_give_equal_texts(client):
    texts = {text_of(generate(client, seed=seed, max_tokens=24)) for seed in (5, 5, 5)}

    assert len(texts) == 1
    assert text_of(generate(client, seed=6, max_tokens=24)) not in texts


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"max_tokens": 100_000}, 400, "context_length_exceeded", "max_tokens"),
        ({"prompts": ["x" * 5000]}, 400, "context_length_exceeded", "prompt"),
        ({"temperature": -1}, 400, "invalid_request", "temperature"),
        ({"temperature": "warm"}, 400, "invalid_request", "temperature"),
        ({"warmth": 1}, 400, "invalid_request", "warmth"),
        ({"prompts": None}, 400, "invalid_request", None),
        ({"artifact_id": "art_z"}, 404, "model_not_found", None),
        ({"artifact_id": "../art_a"}, 404, "model_not_found", None),
        ({"seed": 2**70}, 400, "invalid_request", "seed"),
        ({"prompts": [[10**6]]}, 400, "invalid_request", "prompt"),
        ({"prompts": ["a"] * 5}, 400, "invalid_request", "prompt"),
        ({"logprobs": 21}, 400, "invalid_request", "logprobs"),
        ({"n": 0}, 400, "invalid_request", "n"),
        ({"prompts": ["a"] * 3, "n": 2}, 400, "invalid_request", "n"),
        ({"guided_regex": "(", "ignore_eos": False}, 400, "invalid_request", "guided_regex"),
        (
            {"prompts": None, "messages": [{"role": "user", "content": "a"}], "tools": [{}]},
            400,
            "unsupported_parameter",
            "tools",
        ),
    ],
)
def test_a_bad_request_is_refused_and_stops_nothing(fields, status, code, param, client):
    response = generate(client, **fields)

    assert response.status_code == status
    assert response.json()["code"] == code
    assert response.json()["param"] == param
    assert generate(client).status_code == 200


def test_a_guide_that_becomes_too_much_work_ends_its_answer_with_field_and_remedy(client):
    late = {"guided_regex": "[bc]{5}(a?){300}a{300}", "ignore_eos": False, "max_tokens": 40}

    start, *_, fault = records(generate(client, **late))

    assert start["type"] == "start"
    assert (fault["type"], fault["code"], fault["param"]) == (
        "error", "guide_failed", "guided_regex",
    )  # fmt: skip
    assert fault["message"].startswith("guided_regex: ")
    assert fault["message"].endswith("make it simpler")
    assert generate(client).status_code == 200


def test_only_who_knows_the_token_is_served(client):
    refused = client.get("/models", headers={HEADER: "guess"})

    assert refused.status_code == 401
    assert client.get("/ready", headers={HEADER: ""}).status_code == 200


def test_a_damaged_artifact_is_not_loaded(client):
    response = generate(client, "art_damaged")

    assert response.status_code == 500
    assert response.json()["code"] == "model_failed"
    assert "differs from its sha256" in response.json()["message"]
    assert status_of(client, "art_damaged") == "failed"
    assert generate(client, "art_damaged").json() == response.json()
    assert generate(client).status_code == 200


def test_several_prompts_are_answered_in_one_request_as_each_alone(client):
    prompts = ["once", [104, 105], "upon"]
    alone = [text_of(generate(client, prompts=[each], temperature=0)) for each in prompts]

    together = generate(client, prompts=prompts, temperature=0)

    assert [text_of(together, index) for index in range(3)] == alone
    assert {each["index"] for each in records(together) if each["type"] == "finish"} == {0, 1, 2}
    assert records(together)[-1]["completion_tokens"] == 12
    assert records(together)[-1]["prompt_tokens"] == len("onceupon") + 2


def test_answers_to_several_prompts_fill_the_queue_that_they_are_counted_in(client):
    together = generate(client, prompts=["a", "b"], n=2)
    alone = generate(client, n=16)

    assert records(together)[-1]["completion_tokens"] == 4 * 4
    # a single prompt is taken whatever its answers, when nobody waits
    assert records(alone)[-1]["completion_tokens"] == 16 * 4


def test_an_echo_has_the_log_probabilities_that_generation_has(client):
    text, asked = "hello there", {"logprobs": 3, "temperature": 0}

    start, finish, end = records(generate(client, prompts=[text], echo=True, max_tokens=0, **asked))

    [echo] = start["echo"]
    assert echo["text"] == text
    assert [entry["token"] for entry in echo["logprobs"]] == list(text)
    assert [entry["characters"] for entry in echo["logprobs"]] == [1] * len(text)
    assert echo["logprobs"][0]["logprob"] is None
    assert (finish["finish_reason"], end["completion_tokens"]) == ("length", 0)
    for place in (1, 6, 10):
        drawn = records(generate(client, prompts=[text[:place]], max_tokens=1, **asked))[1]
        [entry], scored = drawn["logprobs"], echo["logprobs"][place]
        assert [each[0] for each in entry["top"]] == [each[0] for each in scored["top"]]
        # one pass over all tokens against one over some: sums in another order
        tops = zip(entry["top"], scored["top"], strict=True)
        assert all(one[2] == pytest.approx(other[2], abs=1e-3) for one, other in tops)
        assert entry["logprob"] == entry["top"][0][2] >= scored["logprob"]


def test_an_echo_is_the_text_that_came_and_ids_are_read(client):
    text = "h🎉<|end|>"
    ids = client.post("/tokenize", json={"artifact_id": "art_a", "prompt": text}).json()["tokens"]

    asked = {"echo": True, "max_tokens": 0, "logprobs": 0}
    [start, *_] = records(generate(client, prompts=[text, ids], **asked))

    assert [each["text"] for each in start["echo"]] == [text, text]
    for each in start["echo"]:
        assert [entry["characters"] for entry in each["logprobs"]] == [1, 0, 0, 0, 1, 7]


def test_texts_become_ids_and_ids_texts(client):
    asked = {"artifact_id": "art_a", "prompt": "h€<|end|>", "return_token_strs": True}

    found = client.post("/tokenize", json=asked).json()
    back = client.post("/detokenize", json={"artifact_id": "art_a", "tokens": found["tokens"]})
    beyond = client.post("/detokenize", json={"artifact_id": "art_a", "tokens": [10**6]})

    assert found["token_strs"] == [
        "h", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "<|end|>"
    ]  # fmt: skip
    assert (found["count"], found["max_model_len"]) == (5, CONTEXT)
    assert back.json() == {"prompt": "h€<|end|>"}
    assert (beyond.status_code, beyond.json()["param"]) == (400, "tokens")


def test_metrics_have_the_names_of_vllm_and_count_what_was_generated(client):
    before = samples(client)

    generate(client, "art_a", max_tokens=3)

    after = samples(client)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["abq:prompt_tokens_total"] == 5
    assert grown["abq:generation_tokens_total"] == 3
    assert grown['abq:request_success_total{finished_reason="length"}'] == 1
    assert grown["abq:inter_token_latency_seconds_count"] == 2
    assert grown["abq:time_to_first_token_seconds_count"] == 1
    assert grown["abq:request_time_per_output_token_seconds_count"] == 1
    parts = ("queue", "prefill", "decode")
    whole = grown["abq:e2e_request_latency_seconds_sum"]
    spent = [grown[f"abq:request_{part}_time_seconds_sum"] for part in parts]
    assert sum(spent) == pytest.approx(whole, rel=0.01)
    assert 'abq:inter_token_latency_seconds_bucket{le="0.0005"}' in after
    assert after["abq:num_requests_waiting"] == 0
    # the last chunk is out before its step is over
    wait_until(lambda: samples(client)["abq:num_requests_running"] == 0, "it runs on", 5)


def test_a_request_keeps_its_id(client):
    headers = {"X-Request-Id": "req_7"}
    body = {"artifact_id": "art_a", "prompts": ["a"], "max_tokens": 1}

    answered = client.post("/generate", json=body, headers=headers)
    refused = client.post("/generate", json=body | {"artifact_id": "none"}, headers=headers)

    assert answered.headers["x-request-id"] == refused.headers["x-request-id"] == "req_7"
    assert answered.headers["x-abq-load"] == "0"


def test_a_model_beyond_the_budget_is_refused_before_it_is_read(client):
    response = generate(client, "art_large")

    assert response.status_code == 500
    assert response.json()["code"] == "model_failed"
    assert "bytes of the" in response.json()["message"]


def test_the_least_recently_used_model_makes_room(client, store):
    generate(client)
    size = next(each["memory_bytes"] for each in client.get("/models").json())

    with run_inference(store, max_running=4, memory_bytes=int(size * 2.9)) as (_, small):
        for name in ("art_a", "art_b", "art_a", "art_c"):
            assert generate(small, name).status_code == 200
        loaded = [model["artifact_id"] for model in small.get("/models").json()]

    assert loaded == ["art_c", "art_a"]


def test_a_full_queue_is_refused_at_once_and_a_disconnect_makes_room(client):
    streams = [Stream(client) for _ in range(4)]

    refused = generate(client)
    streams[0].disconnect()
    wait_until(lambda: generate(client).status_code == 200, "the slot was not given back", 5)

    assert refused.status_code == 503
    assert refused.json()["code"] == "overloaded"
    assert int(refused.headers["Retry-After"]) > 0
    for stream in streams[1:]:
        stream.disconnect()


def test_unloading_ends_what_runs_on_the_model(client):
    stream = Stream(client, "art_b")

    assert client.delete("/models/art_b").status_code == 204

    assert stream.is_over.wait(10)
    assert stream.lines[-1]["type"] == "error"
    assert status_of(client, "art_b") is None


def test_a_model_whose_first_token_fails_leaves_nothing_behind(store, monkeypatch):
    def refuse(answer, token_id):
        raise NoTokenDrawn

    monkeypatch.setattr(Answer, "accept", refuse)
    folder = ArtifactFolder(
        root=store, device="cpu", options=EngineOptions(max_sequences=2, kv_bytes=1 << 22)
    )

    with pytest.raises(NoTokenDrawn):
        folder.open("art_a", lambda progress: None)

    assert "engine" not in {thread.name for thread in threading.enumerate()}


def test_a_stopping_process_finishes_what_runs_and_refuses_what_comes(store):
    with run_inference(store) as (process, client):
        stream = Stream(client, max_tokens=200)
        assert not stream.is_over.is_set()

        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/ready").status_code == 503, "it did not drain", 5)
        refused = generate(client)

        assert refused.status_code == 503
        assert refused.json()["code"] == "draining"
        assert stream.is_over.wait(60)
        assert stream.lines[-2]["finish_reason"] == "length"
        assert process.wait(60) == 0
