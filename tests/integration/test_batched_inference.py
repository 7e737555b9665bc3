"""The inference process over the batching engine, whose runner answers by a hash of the tokens."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from api.errors import ModelNotHosted
from engine.inference.batching import BatchingEngine
from engine.inference.limits import SchedulerLimits
from engine.inference.text import TextCodec
from tests.integration.machine import wait_until
from tests.running_api import run_app
from tests.tiny_llama import save_tiny_tokenizer
from tests.unit.engine.hashing_runner import HashingRunner, scores_of
from worker.inference.app import create_app
from worker.inference.entry import ModelLabels
from worker.inference.generation import Generations
from worker.inference.metrics import InferenceMetrics
from worker.inference.pool import ModelPool
from worker.inference.progress import LoadProgress, LoadStage

IDLE_S = 1.5


class HashingShelf:
    """Opens engines without a model; `reading` holds one up."""

    def __init__(self, text):
        self.text = text
        self.runners = []
        self.reading = threading.Event()
        self.reading.set()

    def check(self, artifact_id):
        if not artifact_id.startswith("art"):
            raise ModelNotHosted

    def describe(self, artifact_id):
        return ModelLabels(artifact_id=artifact_id, model_name="hash", w_bits="2", a_bits="8")

    def memory_needed(self, artifact_id):
        return 1000

    def open(self, artifact_id, on_progress):
        on_progress(LoadProgress(stage=LoadStage.READING, fraction=0.5))
        assert self.reading.wait(10)
        self.runners.append(HashingRunner(pages=256, context_length=1024))
        return BatchingEngine(self.runners[-1], self.text, limits=SchedulerLimits(max_waiting=4))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return HashingShelf(TextCodec.from_directory(save_tiny_tokenizer(tmp_path_factory.mktemp("t"))))


@contextmanager
def run_process(shelf):
    pool = ModelPool(shelf, budget_bytes=3000, load_timeout_s=10, idle_unload_s=IDLE_S)
    metrics = InferenceMetrics(pool.entries)
    generations = Generations(pool, metrics, max_waiting=60, max_running=4)
    with (
        run_app(create_app(pool, generations, metrics, None)) as url,
        httpx.Client(base_url=url, timeout=20, trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(shelf):
    with run_process(shelf) as opened:
        yield opened


def generate(client, prompt="hello", **fields):
    wanted = {"artifact_id": "art_a", "prompts": [prompt], "max_tokens": 8, "ignore_eos": True}
    return client.post("/generate", json=wanted | fields)


def answers_of(response):
    """Text and reason by index."""
    texts, reasons = {}, {}
    for record in map(json.loads, response.text.splitlines()):
        if record["type"] == "token":
            texts[record["index"]] = texts.get(record["index"], "") + record["text"]
        if record["type"] == "finish":
            reasons[record["index"]] = record["finish_reason"]
    return {index: (texts.get(index, ""), reason) for index, reason in reasons.items()}


def model(client, artifact_id="art_a"):
    models = {each["artifact_id"]: each for each in client.get("/models").json()}
    return models.get(artifact_id)


def test_n_answers_have_the_seeds_that_follow(client):
    one_by_one = [answers_of(generate(client, seed=seed))[0] for seed in (5, 6, 7)]

    together = answers_of(generate(client, seed=5, n=3))

    assert [together[index] for index in range(3)] == one_by_one
    assert len(set(one_by_one)) == 3


def test_many_callers_at_once_each_get_their_own_answer(client):
    prompts = [f"caller {number}" for number in range(8)]
    alone = [answers_of(generate(client, prompt, seed=1)) for prompt in prompts]

    with ThreadPoolExecutor(8) as threads:
        together = list(
            threads.map(lambda each: answers_of(generate(client, each, seed=1)), prompts)
        )

    assert together == alone


def runs_all_after_a_step(runner, answers):
    # the prompts of a request come one after the other, steps may be used up before the last
    runner.gate.release()
    return len(runner.open_slots) == answers


def test_a_caller_that_goes_away_frees_its_slots_at_once(client, shelf):
    generate(client)
    runner = shelf.runners[-1]
    runner.gate = threading.Semaphore(20)
    wanted = {"artifact_id": "art_a", "prompts": ["a", "b"], "n": 2, "ignore_eos": True}

    with client.stream("POST", "/generate", json=wanted | {"max_tokens": 900}) as response:
        # an iterator that nobody holds ends the connection
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: runs_all_after_a_step(runner, 4), "not all answers run")
        running = model(client)["running"]
    runner.gate.release(100)
    wait_until(lambda: not runner.open_slots, "the slots were not given back", 5)
    runner.gate = None

    assert running == 4
    assert model(client)["running"] == 0


def test_what_waits_beyond_the_engines_own_queue_is_refused(client, shelf):
    generate(client)
    runner = shelf.runners[-1]
    runner.gate = threading.Semaphore(1)
    wanted = {"artifact_id": "art_a", "prompts": ["a"], "n": 8, "max_tokens": 900}

    with client.stream("POST", "/generate", json=wanted) as response:
        # an iterator that nobody holds ends the connection
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: model(client)["waiting"] == 4, "nothing waits")
        refused = generate(client)
    runner.gate.release(100)
    wait_until(lambda: not runner.open_slots, "the slots were not given back", 5)
    runner.gate = None

    assert refused.status_code == 503
    assert refused.json()["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_p": 2}, "min_p"),
        ({"logit_bias": [[10**6, 1.0]]}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(client, fields, param):
    response = generate(client, **fields)

    assert (response.status_code, response.json()["param"]) == (400, param)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_prompts_are_echoed_with_the_log_probabilities_of_their_tokens(client, shelf, max_tokens):
    prompts = ["to be scored", "a longer one " * 20]
    wanted = {"prompts": prompts, "logprobs": 2, "max_tokens": max_tokens, "seed": 1}

    response = generate(client, echo=True, **wanted)

    echoed = json.loads(response.text.splitlines()[0])["echo"]
    for prompt, record in zip(prompts, echoed, strict=True):
        expected = scores_of(shelf.text.encode(prompt), 2)
        found = [(each["logprob"], [top[2] for top in each["top"]]) for each in record["logprobs"]]
        assert found[0] == (None, [])
        assert found[1:] == [(each.logprob, [v for _, v in each.top]) for each in expected[1:]]
    if max_tokens:
        assert answers_of(response) == answers_of(generate(client, **wanted))


@pytest.mark.parametrize(
    "ids", [[-1], [1 << 40], [100_000], [5] * 9000], ids=["negative", "huge", "beyond", "long"]
)
def test_a_prompt_that_is_echoed_alone_is_checked_like_any_other(client, ids):
    refused = generate(client, prompts=[ids], echo=True, max_tokens=0)

    assert refused.status_code == 400
    assert "prompt" in refused.json()["param"]


def test_metrics_are_fed_from_the_engine(client):
    prompt = "a prompt that fills more than one page"
    generate(client, prompt)
    hits = metric(client, "prefix_cache_hits_total")

    cached = json.loads(generate(client, prompt).text.splitlines()[-1])["cached_tokens"]

    assert cached > 0
    assert metric(client, "prefix_cache_hits_total") == hits + cached
    assert metric(client, "prefix_cache_queries_total") > cached
    assert metric(client, "num_requests_running") == metric(client, "kv_cache_usage_perc") == 0
    assert model(client)["tokens_per_s"] > 0
    # nothing is guessed unless the operator asks for it
    assert metric(client, "spec_decode_num_draft_tokens_total") == 0
    assert metric(client, "spec_decode_num_accepted_tokens_total") == 0


def test_an_engine_that_broke_fails_its_requests_and_is_loaded_again(client, shelf):
    generate(client)
    broken = shelf.runners[-1]

    def fail(plan):
        raise RuntimeError("an illegal access in /secret")

    broken.fault = fail
    failed = json.loads(generate(client).text.splitlines()[-1])
    again = generate(client, seed=3)

    assert (failed["type"], failed["code"]) == ("error", "inference_unavailable")
    assert "secret" not in failed["message"]
    assert answers_of(again)[0][1] == "length"
    assert shelf.runners[-1] is not broken


def test_loading_tells_how_far_it_is(client, shelf):
    shelf.reading.clear()
    client.post("/models/art_slow/load")
    wait_until(lambda: model(client, "art_slow")["stage"] == "reading", "it does not load", 5)
    loading = model(client, "art_slow")

    shelf.reading.set()
    wait_until(lambda: model(client, "art_slow")["status"] == "ready", "it is not ready", 5)
    ready = model(client, "art_slow")

    assert (loading["status"], loading["progress"]) == ("loading", 0.5)
    assert (ready["stage"], ready["progress"]) == (None, None)
    assert ready["memory_bytes"] == 1000


def test_a_model_that_nobody_uses_leaves_memory(client):
    generate(client, artifact_id="art_idle")

    wait_until(lambda: model(client, "art_idle") is None, "it stays in memory", 3 * IDLE_S)

    assert generate(client, artifact_id="art_idle").status_code == 200


def metric(client, name):
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in client.get("/metrics").text.splitlines()
        if line.startswith(f"abq:{name}{{") and 'artifact_id="art_a"' in line
    ]
    assert len(found) == 1
    return found[0]
