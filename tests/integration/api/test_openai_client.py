"""The `openai` package against the API, a real inference process and a quantized checkpoint."""

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import chain
from typing import Literal

import httpx
import openai
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from pydantic import BaseModel

from api.cli.environment import settings_environment
from api.db.connection import Database
from api.settings import InferenceSettings, Settings
from engine.calibration.watch import Watch
from engine.inference.engine import open_engine
from engine.pipeline import EvaluationPlan, QuantJob, quantize_model
from engine.spec import CalibrationSpec, QuantSpec, Recipe
from tests.integration.machine import ROOT, wait_until
from tests.running_api import run_api
from tests.servers import free_port
from tests.task_files import GOALS, save_tasks, save_writing_task
from tests.tiny_llama import save_tiny_llama

MESSAGES = [{"role": "user", "content": "hello"}]
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<|system|>{{ tool['function']['name'] }}"
    "({{ tool['function']['parameters']['required'] | join(',') }})<|end|>{% endfor %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }}"
    "{{ call['function']['arguments'] | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Shows tools and calls the way that templates of published models do."""


class Weather(BaseModel):
    """What an answer is read into."""

    sky: Literal["clear", "grey"]
    is_cold: bool


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The files of a tiny model at W4A8, as the worker stores them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    calibration = CalibrationSpec(samples=1, length=16, epochs=0)
    source = save_tiny_llama(folder / "source", positions=4096)
    (source / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    job = QuantJob(
        source_dir=source,
        out_dir=folder / "out",
        state_dir=folder / "state",
        spec=QuantSpec(w_bits=4, a_bits=8, recipe=Recipe.RTN, calibration=calibration),
        evaluation=EvaluationPlan(enabled=False),
    )
    quantize_model(job, Watch(on_event=lambda event: None))
    return {
        str(path.relative_to(job.out_dir)): path.read_bytes()
        for path in job.out_dir.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def hosting(tmp_path_factory, sqlite_template, checkpoint):
    """A server that hosts the checkpoint as `tiny`, and its inference process."""
    folder = tmp_path_factory.mktemp("hosting")
    shutil.copyfile(sqlite_template, folder / "abq.db")
    url = f"http://127.0.0.1:{free_port()}"
    settings = Settings(
        data_dir=folder, inference=InferenceSettings(url=url, threads=1, device="cpu")
    )
    database = Database(settings.database_url)
    process = start_inference(settings, folder)
    try:
        with run_api(settings, database) as api:
            wait_until(lambda: answers(url), "the inference process did not start")
            job_id, _ = api.artifact(files=checkpoint)
            with api.client() as client:
                wanted = {"quantization_id": job_id, "name": "tiny"}
                made = client.post("/v1/deployments", json=wanted).json()
                address = f"/v1/deployments/{made['id']}"
                wait_until(
                    lambda: client.get(address).json()["status"] == "ready",
                    "the model was not loaded",
                )
            yield api
    finally:
        process.terminate()
        process.wait(20)
        database.close()


@pytest.fixture
def client(hosting):
    with openai.OpenAI(
        api_key=hosting.key("infer:invoke"),
        base_url=f"{hosting.url}/v1",
        http_client=openai.DefaultHttpxClient(trust_env=False),
        max_retries=0,
    ) as opened:
        yield opened


def test_a_chat_streams_the_text_that_it_also_answers_as_a_whole(client):
    wanted = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 3}
    whole = client.chat.completions.create(**wanted)

    stream = client.chat.completions.create(
        **wanted, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)

    text = "".join(each.choices[0].delta.content or "" for each in chunks)
    assert text == whole.choices[0].message.content != ""
    assert len([each for each in chunks if each.choices[0].delta.content]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens == 24


def test_a_conversation_goes_on_from_the_answer_that_the_client_has(client):
    wanted = {"model": "tiny", "max_tokens": 4, "seed": 3}
    answer = client.chat.completions.create(**wanted, messages=MESSAGES).choices[0].message
    plain = {"role": "assistant", "content": answer.content}

    answers = [
        client.chat.completions.create(**wanted, messages=[*MESSAGES, turn, *MESSAGES])
        for turn in (answer, answer.model_dump(), plain)
    ]

    assert len({each.usage.prompt_tokens for each in answers}) == 1
    assert len({each.choices[0].message.content for each in answers}) == 1


def test_a_seed_repeats_a_sample_and_stop_ends_it(client):
    wanted = {"model": "tiny", "prompt": "once", "max_tokens": 16, "temperature": 1.0}

    first, second = (client.completions.create(**wanted, seed=7) for _ in range(2))
    text = first.choices[0].text
    stopped = client.completions.create(**wanted, seed=7, stop=text[3])

    assert second.choices[0].text == text
    assert stopped.choices[0].text == text[: text.index(text[3])]
    assert stopped.choices[0].finish_reason == "stop"


def test_the_model_list_iterates(client):
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_refusals_are_the_clients_own_exceptions(client):
    wanted = {"model": "tiny", "messages": MESSAGES}

    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**wanted | {"model": "other"})
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(**wanted, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(**wanted, max_tokens=100_000)
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="abq_live_wrong").models.list()

    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert (unsupported.value.code, unsupported.value.param) == (
        "unsupported_parameter", "temprature",
    )  # fmt: skip
    assert too_long.value.code == "context_length_exceeded"
    assert stranger.value.code == "invalid_api_key"


def test_a_caller_that_leaves_frees_the_model_for_the_next(client, hosting):
    long = {"model": "tiny", "prompt": "once", "max_tokens": 4000, "temperature": 0}
    streams = [client.completions.create(**long, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
        stream.close()

    # four run at a time: this one waits for its turn unless the others have ended
    started = time.monotonic()
    client.completions.create(model="tiny", prompt="x", max_tokens=1)

    # one of them alone takes twenty seconds to its end, more where the machine is busy
    assert time.monotonic() - started < 15


def test_log_probabilities_come_in_the_clients_own_types(client):
    wanted = {"model": "tiny", "max_tokens": 3, "temperature": 0}

    chat = client.chat.completions.create(
        **wanted, messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    text = client.completions.create(**wanted, prompt=["ab", "abc"], logprobs=2, echo=True)

    tokens = chat.choices[0].logprobs.content
    assert len(tokens) == 3
    for each in tokens:
        assert each.logprob == each.top_logprobs[0].logprob <= 0
        assert bytes(each.bytes).decode(errors="replace")
    first, second = (each.logprobs for each in text.choices)
    assert [each.index for each in text.choices] == [0, 1]
    assert (first.tokens[:2], second.tokens[:3]) == (["a", "b"], ["a", "b", "c"])
    assert (len(first.tokens), len(second.tokens)) == (5, 6)
    assert first.token_logprobs[0] is first.top_logprobs[0] is None
    # the same two letters: whatever follows changes nothing before it
    assert second.token_logprobs[1] == pytest.approx(first.token_logprobs[1], abs=1e-3)


def test_streams_of_two_answers_with_log_probabilities_add_up_to_the_whole(client):
    wanted = {"model": "tiny", "max_tokens": 12, "seed": 3, "n": 2}
    chat = wanted | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    text = wanted | {"prompt": "once", "logprobs": 2}

    whole_chat = client.chat.completions.create(**chat)
    whole_text = client.completions.create(**text)
    chat_chunks = list(client.chat.completions.create(**chat, stream=True))
    text_chunks = list(client.completions.create(**text, stream=True))

    for index in range(2):
        choice, told = whole_chat.choices[index], pieces_of(chat_chunks, index)
        assert "".join(each.delta.content or "" for each in told) == choice.message.content
        tokens = [token for each in told if each.logprobs for token in each.logprobs.content]
        assert tokens == choice.logprobs.content
        assert len(tokens) == 12
        choice, told = whole_text.choices[index], pieces_of(text_chunks, index)
        assert "".join(each.text for each in told) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(each.logprobs, name) for each in told if each.logprobs]
            assert list(chain.from_iterable(parts)) == getattr(choice.logprobs, name)
    assert whole_text.choices[0].text != whole_text.choices[1].text


def test_an_echo_streams_the_prompt_ahead_of_the_answer(client):
    wanted = {"model": "tiny", "prompt": "once", "max_tokens": 6, "temperature": 0, "logprobs": 1}
    alone = client.completions.create(**wanted)

    chunks = list(client.completions.create(**wanted, echo=True, stream=True))
    scored = client.completions.create(**wanted | {"max_tokens": 0}, echo=True)

    assert "".join(each.choices[0].text for each in chunks) == "once" + alone.choices[0].text
    parts = [each.choices[0].logprobs for each in chunks if each.choices[0].logprobs]
    assert [token for each in parts for token in each.tokens][:4] == list("once")
    assert [place for each in parts for place in each.text_offset][:5] == [0, 1, 2, 3, 4]
    assert parts[0].token_logprobs[0] is None
    assert scored.choices[0].text == "once"
    assert scored.choices[0].logprobs.token_logprobs == parts[0].token_logprobs[:4]
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (4, 0)


def test_an_answer_streams_into_the_clients_own_class(client):
    # random weights write white space without end unless its tokens are made unlikely
    spaces = dict.fromkeys(blank_ids(client), -100)

    with client.chat.completions.stream(
        model="tiny",
        messages=MESSAGES,
        response_format=Weather,
        max_tokens=60,
        seed=3,
        logit_bias=spaces,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]

    assert isinstance(final.message.parsed, Weather)
    assert Weather.model_validate_json(final.message.content) == final.message.parsed
    assert (final.finish_reason, kinds[-1]) == ("stop", "content.done")
    assert kinds.count("content.delta") > 3


def test_tools_reach_the_model_through_its_template(client):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "required": ["place"],
            },
        },
    }
    called = {"name": "weather", "arguments": '{"place": "Rome"}'}
    turns = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": called}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "grey"},
    ]
    wanted = {"model": "tiny", "max_tokens": 8, "temperature": 0}

    shown = client.chat.completions.create(**wanted, messages=turns, tools=[tool])
    hidden = client.chat.completions.create(
        **wanted, messages=MESSAGES, tools=[tool], tool_choice="none"
    )

    conversation = (
        "<|system|>weather(place)<|end|><|user|>hello<|end|>"
        '<|assistant|>weather{"place": "Rome"}<|end|><|tool|>grey<|end|><|assistant|>'
    )
    rendered = client.completions.create(**wanted, prompt=conversation)
    assert shown.usage.prompt_tokens == rendered.usage.prompt_tokens
    assert shown.choices[0].message.content == rendered.choices[0].text
    assert shown.choices[0].message.tool_calls is None
    assert hidden.usage.prompt_tokens == 8
    with pytest.raises(openai.BadRequestError) as forced:
        client.chat.completions.create(
            **wanted, messages=MESSAGES, tools=[tool], tool_choice="required"
        )
    assert forced.value.param == "tool_choice"


def test_texts_and_ids_are_turned_into_each_other(client, hosting):
    with hosting.client("infer:invoke") as http:
        asked = {"model": "tiny", "messages": MESSAGES}
        found = http.post("/v1/tokenize", json=asked).json()
        back = http.post("/v1/detokenize", json={"model": "tiny", "tokens": found["tokens"]})
        refused = http.post("/v1/tokenize", json={"model": "tiny"})

    assert back.json() == {"prompt": "<|user|>hello<|end|><|assistant|>"}
    assert found["count"] == len(found["tokens"]) == 8
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    by_ids = client.completions.create(
        model="tiny", prompt=found["tokens"], max_tokens=8, temperature=0
    )
    by_chat = client.chat.completions.create(**asked, max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == by_chat.choices[0].message.content
    assert by_ids.usage.prompt_tokens == by_chat.usage.prompt_tokens == 8


def test_an_evaluation_harness_runs_its_tasks_over_the_endpoint(
    client, hosting, tmp_path, monkeypatch
):
    """`lm-eval run --model local-completions`, against what the checkpoint says in this process."""
    (directory,) = hosting.settings.storage_root.glob("art_*")
    wanted = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    texts = {
        prompt: client.completions.create(**wanted, prompt=prompt).choices[0].text
        for prompt in ("once", "number 7", "a")
    }
    until = texts["once"][5]
    answers = {prompt: text.split(until)[0] for prompt, text in texts.items()}
    tasks = save_tasks(tmp_path / "tasks")
    save_writing_task(tasks, answers, until)
    monkeypatch.setenv("OPENAI_API_KEY", hosting.key("infer:invoke"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    found = simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{hosting.url}/v1/completions",
            "tokenizer": str(directory),
            "num_concurrent": 2,
            "max_retries": 1,
        },
        tasks=["piqa", "write"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )

    assert found["results"]["write"]["exact_match,none"] == 1.0
    asked = [
        (*arguments, score)
        for sample in found["samples"]["piqa"]
        for arguments, (score,) in zip(sample["arguments"], sample["resps"], strict=True)
    ]
    assert len(asked) == 2 * len(GOALS)
    with closing(open_engine(directory, "cpu")) as engine:
        for context, rest, (total, is_greedy) in asked:
            ids = engine.text.encode(context + rest)
            scores = engine.score_prompt(ids, 1, lambda: False)[-len(rest) :]
            # several prompts in one request: sums in another order
            assert total == pytest.approx(sum(each.logprob for each in scores), abs=1e-2)
            assert is_greedy == all(each.top[0][0] == each.token_id for each in scores)


def test_callers_at_the_same_time_each_get_their_own_text(client):
    prompts = [f"number {number}" for number in range(6)]

    def complete(prompt):
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, temperature=0
        )
        return answer.choices[0].text

    alone = [complete(prompt) for prompt in prompts]
    together = {}
    threads = [
        threading.Thread(target=lambda each=each: together.update({each: complete(each)}))
        for each in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [together[each] for each in prompts] == alone


def pieces_of(chunks, index):
    """What a stream says of one answer."""
    return [each for chunk in chunks for each in chunk.choices if each.index == index]


def blank_ids(client):
    """Ids of a space, a tabulator and the ends of lines."""
    asked = {"model": "tiny", "prompt": " \t\n\r"}
    return client.post("/tokenize", body=asked, cast_to=dict)["tokens"]


def start_inference(settings, folder):
    with (folder / "inference.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "worker.inference"],
            cwd=ROOT,
            env={**settings_environment(settings, os.environ), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stderr=log,
        )


def answers(url):
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
