"""Hundreds of requests of every kind at once, on a model whose cache is too small for them.

`MIXED_REQUESTS=10000` asks for more of them.
"""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from tests.integration.machine import wait_until
from tests.integration.test_inference import (
    checkpoint,  # noqa: F401  a fixture
    generate,
    run_inference,
    samples,
)

REQUESTS = int(os.environ.get("MIXED_REQUESTS", "300"))
CALLERS = 16
CACHE_TOKENS = 320
PAGE_TOKENS = 16
TOKEN_BYTES = 512
"""Of keys and values: float32 on a CPU."""
OPENINGS = ("", "once upon a time there was a model ", "translate this into numbers and back: ")
REFUSED = (
    {"prompts": [[10**6]]},
    {"temperature": -1},
    {"max_tokens": 100_000},
    {"logprobs": 21},
    {"guided_regex": "(", "ignore_eos": False},
    {"warmth": 1},
    {"prompts": None},
)


@pytest.fixture(scope="module")
def client(checkpoint):  # noqa: F811  the fixture
    """Of a process whose cache is full with one of the longest answers."""
    limits = {"max_running": 16, "max_waiting": 100}
    # one page more: the scratch page holds nobody's tokens
    sizes = {"kv_bytes": (CACHE_TOKENS + PAGE_TOKENS) * TOKEN_BYTES, "context_length": CACHE_TOKENS}
    folder = checkpoint.parent / "artifacts"
    folder.mkdir()
    (folder / "art_a").symlink_to(checkpoint)
    with run_inference(folder, **limits, **sizes) as (_, opened):
        yield opened


def greedy_bodies(chance):
    """Requests to compare: most are short; one grows until the cache has no room for it."""
    short = [
        {
            "prompts": [chance.choice(OPENINGS) + "a1 " * chance.randint(1, 12)],
            "max_tokens": chance.randint(1, 12),
        }
        for _ in range(24)
    ]
    growing = {"prompts": [f"{each} times" for each in range(5)], "max_tokens": 60}
    return [{**body, "temperature": 0} for body in (*short, growing)]


def answers_one_by_one(client, body):
    """What each prompt of a request is answered when nothing else runs."""
    alone = [generate(client, **{**body, "prompts": [each]}) for each in body["prompts"]]
    return {place: answers_of(each)[0] for place, each in enumerate(alone)}


def sampled_body(chance):
    """A request whose answers are not compared: several, scored, guided or penalized."""
    return {
        "prompts": ["b" * chance.randint(1, 60) for _ in range(chance.randint(1, 2))],
        "max_tokens": chance.randint(1, 8),
        "seed": chance.randint(0, 99),
    } | chance.choice(
        [
            {"n": 2},
            {"logprobs": 3, "echo": True},
            {"guided_regex": "[ab]{1,9}", "ignore_eos": False},
            {"repetition_penalty": 1.2, "stop": ["q"]},
        ]
    )


def answers_of(response):
    """Text and reason of every answer, after a look at whether all of them came to their end."""
    assert response.status_code == 200, response.text
    start, *records, end = map(json.loads, response.text.splitlines())
    assert (start["type"], end["type"]) == ("start", "end")
    texts, reasons = {}, {}
    for record in records:
        if record["type"] == "finish":
            reasons[record["index"]] = record["finish_reason"]
        else:
            texts[record["index"]] = texts.get(record["index"], "") + record["text"]
    return {index: (texts.get(index, ""), reason) for index, reason in reasons.items()}


def leave(client, body, lines):
    """Go away after some lines of a long answer; for none, without waiting for its beginning."""
    body = {"artifact_id": "art_a", "ignore_eos": True, "max_tokens": 180, **body}
    patience = None if lines else 0.02
    with (
        suppress(httpx.ReadTimeout),
        client.stream("POST", "/generate", json=body, timeout=patience) as response,
    ):
        assert response.status_code == 200
        assert (
            len([line for _, line in zip(range(lines), response.iter_lines(), strict=False)])
            == lines
        )


def test_a_mixed_load_loses_nobody_and_leaves_no_page_behind(client):
    chance = random.Random(5)  # noqa: S311 - the same load every time
    greedy = greedy_bodies(chance)
    alone = [answers_one_by_one(client, body) for body in greedy]
    kinds = chance.choices(["greedy", "sampled", "refused", "left"], [8, 3, 4, 5], k=REQUESTS)

    def ask(kind, seed):
        own = random.Random(seed)  # noqa: S311 - the same load every time
        match kind:
            case "greedy":
                place = own.randrange(len(greedy))
                assert answers_of(generate(client, **greedy[place])) == alone[place]
            case "sampled":
                body = sampled_body(own)
                count = len(body["prompts"]) * body.get("n", 1)
                assert set(answers_of(generate(client, **body))) == set(range(count))
            case "refused":
                assert generate(client, **own.choice(REFUSED)).status_code == 400
            case "left":
                leave(client, {"prompts": ["c" * own.randint(1, 60)]}, own.randint(0, 3))
        return kind

    with ThreadPoolExecutor(CALLERS) as callers:
        ended = list(callers.map(ask, kinds, range(REQUESTS)))

    assert ended == kinds
    wait_until(lambda: samples(client)["abq:num_requests_running"] == 0, "one still runs", 5)
    after = samples(client)
    assert after["abq:num_requests_waiting"] == after["abq:kv_cache_usage_perc"] == 0
    assert after["abq:num_preemptions_total"] > 0
    # all of the cache, in one answer: a page that was lost would be missing
    whole = generate(client, prompts=["d" * 40], max_tokens=CACHE_TOKENS - 40, temperature=0)
    assert answers_of(whole)[0][1] == "length"
