"""The OpenAI-compatible routes: shapes, refusals by name, and callers that go away."""

import json
import shutil
import time
from uuid import uuid4

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from api.db.connection import Database
from api.settings import InferenceSettings, Settings
from tests.fake_inference import END, FINISH, START, run_fake_inference, token
from tests.running_api import run_api

CHAT = {"model": "hosted", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "hosted", "prompt": "hi"}
SHARED = "between-us"
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def fakes():
    """Two scripted inference services; the second is met only by who asks for it."""
    with run_fake_inference() as first, run_fake_inference() as second:
        yield first, second


@pytest.fixture(scope="module")
def served(tmp_path_factory, sqlite_template, fakes):
    """One API for the module, over SQLite, with the first service."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copyfile(sqlite_template, folder / "abq.db")
    wired = InferenceSettings(url=fakes[0].url, token=SHARED, load_timeout_s=20)
    settings = Settings(data_dir=folder, inference=wired)
    database = Database(settings.database_url)
    with run_api(settings, database) as api:
        yield api
    database.close()


@pytest.fixture
def inference(fakes):
    fakes[0].reset()
    return fakes[0]


@pytest.fixture
def hosting(served, inference):
    """A client of a tenant of its own that hosts `hosted` on the scripted inference service."""
    tenant = uuid4().hex
    job_id, _ = served.artifact(tenant)
    with served.client(tenant=tenant) as client:
        client.post("/v1/deployments", json={"quantization_id": job_id, "name": "hosted"})
        yield client


@pytest.fixture
def database_url(sqlite_url):
    """One database is enough: nothing here depends on which."""
    return sqlite_url


def read_data(response):
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [line.removeprefix("data: ") for line in lines]


def test_a_chat_is_answered_as_a_whole(hosting, inference):
    response = hosting.post(CHAT_URL, json=CHAT | {"seed": 5, "stop": "x", "temperature": 0})

    answer = response.json()
    assert response.status_code == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip
    asked = inference.requests[0]
    assert asked["messages"] == [{"role": "user", "content": "hi"}]
    assert (asked["seed"], asked["stop"], asked["temperature"]) == (5, ["x"], 0)
    assert asked["artifact_id"] == inference.loaded[0]
    assert inference.headers[0]["x-abq-internal-token"] == SHARED


def test_a_chat_is_streamed_in_chunks_up_to_done(hosting):
    wanted = CHAT | {"stream": True, "stream_options": {"include_usage": True}}

    response = hosting.post(CHAT_URL, json=wanted)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, last = read_data(response)
    chunks = [json.loads(each) for each in chunks]
    assert last == "[DONE]"
    assert len({each["id"] for each in chunks}) == 1
    deltas = [each["choices"][0]["delta"] for each in chunks[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}
    ]  # fmt: skip
    assert [each["usage"] for each in chunks[:-1]] == [None] * 4
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5


def test_a_text_is_completed_whole_and_in_chunks(hosting, inference):
    whole = hosting.post(TEXT_URL, json=TEXT).json()
    *chunks, last = read_data(hosting.post(TEXT_URL, json=TEXT | {"stream": True}))

    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", "Hello")
    counted = TEXT | {"stream": True, "stream_options": {"include_usage": True}}
    *_, usage, _ = read_data(hosting.post(TEXT_URL, json=counted))
    texts = [json.loads(each)["choices"][0]["text"] for each in chunks]
    assert (json.loads(usage)["choices"], json.loads(usage)["usage"]["total_tokens"]) == ([], 5)
    assert ("".join(texts), last) == ("Hello", "[DONE]")
    assert "usage" not in json.loads(chunks[0])
    # OpenAI's default for plain completions
    assert inference.requests[0]["max_tokens"] == 16


def test_the_newer_name_of_the_token_limit_wins(hosting, inference):
    hosting.post(CHAT_URL, json=CHAT | {"max_tokens": 5, "max_completion_tokens": 7})

    assert inference.requests[0]["max_tokens"] == 7


def test_parts_of_text_are_joined_and_values_that_mean_unused_are_accepted(hosting, inference):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    unused = {"n": 1, "tools": [], "logprobs": False, "frequency_penalty": 0.0, "user": "me"}
    unused |= {"response_format": {"type": "text"}, "metadata": {"k": "v"}, "stop": None}

    response = hosting.post(
        CHAT_URL, json=CHAT | unused | {"messages": [{"role": "user", "content": parts}]}
    )

    assert response.status_code == 200
    assert inference.requests[0]["messages"][0]["content"] == "ab"


def test_an_answers_turn_is_taken_back_as_a_client_writes_it(hosting, inference):
    answer = {
        "role": "assistant", "content": "Hello", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    turns = [*CHAT["messages"], answer, *CHAT["messages"]]

    response = hosting.post(CHAT_URL, json=CHAT | {"messages": turns})

    assert response.status_code == 200
    assert inference.requests[0]["messages"][1] == {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "member", [{"refusal": "no"}, {"annotations": [{"type": "url_citation"}]}, {"audio": {}}]
)
def test_a_member_of_a_turn_that_says_something_is_refused(hosting, inference, member):
    (name,) = member

    response = hosting.post(
        CHAT_URL, json=CHAT | {"messages": [{"role": "assistant", "content": "a", **member}]}
    )

    assert (response.status_code, response.json()["error"]["param"]) == (400, f"messages.0.{name}")
    assert inference.requests == []


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (CHAT_URL, CompletionCreateParamsBase),
        (TEXT_URL, completion_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_the_official_client_may_be_null(hosting, inference, url, kind):
    wanted = CHAT if url == CHAT_URL else TEXT
    unused = dict.fromkeys(kind.__annotations__) | wanted

    response = hosting.post(url, json=unused)

    assert response.status_code == 200
    assert len(inference.requests) == 1


@pytest.mark.parametrize(
    ("url", "field", "value", "code"),
    [
        (CHAT_URL, "reasoning_effort", "low", "unsupported_parameter"),
        (CHAT_URL, "temprature", None, "unsupported_parameter"),
        (CHAT_URL, "functions", [{"name": "f"}], "unsupported_parameter"),
        (CHAT_URL, "echo", True, "unsupported_parameter"),
        (CHAT_URL, "temprature", 0.5, "unsupported_parameter"),
        (TEXT_URL, "best_of", 2, "unsupported_parameter"),
        (TEXT_URL, "suffix", "!", "unsupported_parameter"),
        (TEXT_URL, "max_completion_tokens", 5, "unsupported_parameter"),
        (CHAT_URL, "tool_choice", "required", "invalid_request"),
        (CHAT_URL, "top_logprobs", 2, "invalid_request"),
        (CHAT_URL, "temperature", 3, "invalid_request"),
        (CHAT_URL, "n", 17, "invalid_request"),
        (CHAT_URL, "presence_penalty", 2.5, "invalid_request"),
        (CHAT_URL, "max_tokens", 0, "invalid_request"),
        (CHAT_URL, "min_tokens", 2_000_000, "invalid_request"),
        (CHAT_URL, "stop", ["a"] * 17, "invalid_request"),
        (CHAT_URL, "stream_options", {"include_usage": True}, "invalid_request"),
        (TEXT_URL, "max_tokens", 0, "invalid_request"),
        (TEXT_URL, "min_tokens", 17, "invalid_request"),
        (TEXT_URL, "logprobs", 21, "invalid_request"),
        (TEXT_URL, "logprobs", True, "invalid_request"),
        (TEXT_URL, "prompt", [], "invalid_request"),
        (TEXT_URL, "prompt", [1, "a"], "invalid_request"),
        (TEXT_URL, "prompt", [[1], "a"], "invalid_request"),
        (TEXT_URL, "prompt", [True], "invalid_request"),
        (TEXT_URL, "prompt", [-1], "invalid_request"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    hosting, inference, url, field, value, code
):
    response = hosting.post(url, json=(CHAT if url == CHAT_URL else TEXT) | {field: value})

    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", field, code)
    assert field in error["message"]
    assert inference.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages.0.mood"),
    ],
)
def test_what_is_wrong_inside_of_a_field_is_named_by_its_place(hosting, inference, fields, param):
    response = hosting.post(CHAT_URL, json=CHAT | fields)

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert inference.requests == []


SAYS_HALF = {"messages": [{"role": "user", "content": "cut \ud83d"}]}
CALLS_HALF = {"id": "c", "type": "function", "function": {"name": "f", "arguments": float("nan")}}


@pytest.mark.parametrize(
    ("url", "fields", "param"),
    [
        (CHAT_URL, SAYS_HALF, "messages.0.content"),
        ("/v1/tokenize", SAYS_HALF, "messages.0.content"),
        (
            CHAT_URL,
            {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]},
            "messages.0.name",
        ),
        (
            CHAT_URL,
            {"messages": [{"role": "assistant", "tool_calls": [CALLS_HALF]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        (
            CHAT_URL,
            {"tools": [{"type": "function", "function": {"name": "\ud800"}}]},
            "tools.0.function.name",
        ),
        (
            CHAT_URL,
            {"tools": [{"type": "function", "function": {"list": [0, {"least": -1e999}]}}]},
            "tools.0.function.list.1.least",
        ),
        (
            CHAT_URL,
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"const": "\ud800"}},
                }
            },
            "response_format.json_schema.schema.const",
        ),
        (CHAT_URL, {"temperature": float("nan")}, "temperature"),
    ],
)
def test_what_json_in_utf8_cannot_say_is_refused_by_its_place(
    hosting, inference, url, fields, param
):
    # Python's own writer takes NaN and half of a pair, as do careless clients
    body = json.dumps((CHAT if url == CHAT_URL else {"model": "hosted"}) | fields)

    response = hosting.post(url, content=body, headers={"Content-Type": "application/json"})

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert param in response.json()["error"]["message"]
    assert inference.requests == []


@pytest.mark.parametrize("name", ["half \ud800", float("nan")])
def test_a_problem_document_repeats_what_it_cannot_encode_spelled_out(shared_api, name):
    body = json.dumps({"artifact_id": name})

    with shared_api.client() as client:
        headers = {"Content-Type": "application/json"}
        response = client.post("/v1/deployments", content=body, headers=headers)

    (fault,) = response.json()["errors"]
    assert (response.status_code, fault["param"]) == (422, "artifact_id")
    assert fault["value"] in {"half \\ud800", "nan"}


@pytest.mark.parametrize(
    ("url", "fields", "param", "message"),
    [
        (TEXT_URL, {"prompt": "\ud800"}, "prompt", "'\\ud800' is not possible: write whole"),
        (TEXT_URL, {"prompt": ["a", "\ud800"]}, "prompt.1", "write whole characters"),
        (TEXT_URL, {"prompt": [[1], [2, -3]]}, "prompt.1", "-3 is not possible: token ids are not"),
        (TEXT_URL, {"prompt": [5, -1]}, "prompt", "-1 is not possible: token ids are not negative"),
        (CHAT_URL, {"repetition_penalty": 1e-300}, "repetition_penalty", "1e-300 is not valid"),
        (CHAT_URL, {"messages": 5}, "messages", "5 is not valid: input should be a valid list"),
        (CHAT_URL, {"messages": []}, "messages", "is not valid: list should have at least 1 item"),
        (CHAT_URL, {"messages": ["a"]}, "messages.0", "'a' is not valid: write a JSON object"),
    ],
)
def test_a_refusal_names_field_value_and_remedy(hosting, inference, url, fields, param, message):
    body = json.dumps((CHAT if url == CHAT_URL else TEXT) | fields)

    response = hosting.post(url, content=body, headers={"Content-Type": "application/json"})

    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(param)
    assert message in error["message"]
    assert inference.requests == []


def test_several_faults_are_told_with_values_and_remedies(hosting):
    wrong = {"temperature": 3, "n": 0, "logit_bias": {"7": 101}}
    unknown = {f"field_{number}": number for number in range(6)}

    several = hosting.post(CHAT_URL, json=CHAT | wrong).json()["error"]["message"]
    many = hosting.post(CHAT_URL, json=CHAT | unknown).json()["error"]["message"]

    assert several.startswith("3 fields are not valid: n = 0 is not valid: ")
    assert "temperature = 3 is not valid: input should be less than or equal to 2;" in several
    assert "logit_bias.7 = 101 is not valid: " in several
    assert "field_4 = 4 is no supported field; remove it" in many
    assert many.endswith("; also field_5.")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (json.dumps(CHAT), None, "send it with Content-Type: application/json"),
        (json.dumps(CHAT), "text/plain", "send it with Content-Type: application/json"),
        ('{"model": ', "application/json", "no valid JSON: expecting value at character 10"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "application/json", "nests too deep"),
        ('{"seed":' + "1" * 5000 + "}", "application/json", "too many digits"),
        (b'{"model": "\xff"}', "application/json", "no valid UTF-8"),
        ("[]", "application/json", "write a JSON object"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_what_would_do(hosting, content, kind, message):
    headers = {} if kind is None else {"Content-Type": kind}

    response = hosting.post(CHAT_URL, content=content, headers=headers)

    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"]


@pytest.mark.parametrize(
    ("url", "fields", "param"),
    [
        *((CHAT_URL, {"stop": value}, "stop") for value in (0, False, {})),
        *((CHAT_URL, {"temperature": value}, "temperature") for value in ("0.5", True)),
        *((CHAT_URL, {"n": value}, "n") for value in ("2", True)),
        *((CHAT_URL, {"stream": value}, "stream") for value in ("yes", 1)),
        (CHAT_URL, {"logprobs": 1}, "logprobs"),
        (CHAT_URL, {"logit_bias": {"5": "1"}}, "logit_bias.5"),
        (CHAT_URL, {"stop_token_ids": ["1"]}, "stop_token_ids.0"),
        (
            CHAT_URL,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}]},
            "messages.0.content",
        ),
        (TEXT_URL, {"echo": "true"}, "echo"),
        (TEXT_URL, {"max_tokens": "5"}, "max_tokens"),
        (TEXT_URL, {"logprobs": "1"}, "logprobs"),
    ],
)
def test_a_value_of_another_kind_is_not_guessed_at(hosting, inference, url, fields, param):
    response = hosting.post(url, json=(CHAT if url == CHAT_URL else TEXT) | fields)

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert inference.requests == []


@pytest.mark.parametrize("stop", [None, []])
def test_no_stop_text_is_written_as_null_or_an_empty_list(hosting, inference, stop):
    response = hosting.post(CHAT_URL, json=CHAT | {"stop": stop, "temperature": 1})

    assert response.status_code == 200
    assert inference.requests[0]["stop"] == []


def test_every_field_of_a_chat_reaches_the_model(hosting, inference):
    schema = {"type": "object"}
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    same = {
        "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5, "seed": -3, "n": 2,
        "frequency_penalty": -0.5, "stop_token_ids": [7], "min_tokens": 2, "top_p": 0.5,
        "ignore_eos": True, "temperature": 0.7, "stop": ["x", "y"],
    }  # fmt: skip
    named = {"name": "n", "schema": schema, "strict": True}
    wanted = {"response_format": {"type": "json_schema", "json_schema": named}}

    response = hosting.post(
        CHAT_URL,
        json=CHAT | same | wanted | {
            "messages": turns, "tools": [tool], "logit_bias": {"9": -100, "5": 1.5},
            "top_k": -1, "logprobs": True, "top_logprobs": 4,
        },
    )  # fmt: skip

    assert response.status_code == 200
    (asked,) = inference.requests
    assert {name: asked[name] for name in same} == same
    assert asked["logit_bias"] == [[5, 1.5], [9, -100.0]]
    assert (asked["top_k"], asked["logprobs"]) == (0, 4)
    assert asked["response_format"] == {"kind": "json_schema", "text": json.dumps(schema)}
    assert (asked["tools"], asked["messages"][1]["tool_calls"]) == ([tool], [call])
    assert asked["messages"][2] == {"role": "tool", "tool_call_id": "c", "content": "2"}
    assert asked["tenant"].startswith("key_")
    assert asked["cache_salt"]


@pytest.mark.parametrize(
    ("prompt", "passed_on"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_has_any_of_four_shapes(hosting, inference, prompt, passed_on):
    response = hosting.post(TEXT_URL, json=TEXT | {"prompt": prompt, "echo": True, "logprobs": 0})

    assert response.status_code == 200
    (asked,) = inference.requests
    assert (asked["prompts"], asked["echo"], asked["logprobs"]) == (passed_on, True, 0)


def test_several_answers_keep_their_own_texts_and_ends(hosting, inference):
    other = {"type": "finish", "index": 1, "finish_reason": "length"}
    inference.records = [START, token("a"), token("b", index=1), other, token("c"), FINISH, END]

    whole = hosting.post(CHAT_URL, json=CHAT | {"n": 2}).json()
    *chunks, _ = read_data(hosting.post(CHAT_URL, json=CHAT | {"n": 2, "stream": True}))

    answers = [
        (each["index"], each["message"]["content"], each["finish_reason"])
        for each in whole["choices"]
    ]
    assert answers == [(0, "ac", "stop"), (1, "b", "length")]
    choices = [json.loads(each)["choices"][0] for each in chunks]
    told = [
        (each["index"], each["delta"].get("content"), each["finish_reason"]) for each in choices
    ]
    assert told == [
        (0, "", None), (1, "", None), (0, "a", None), (1, "b", None), (1, None, "length"),
        (0, "c", None), (0, None, "stop"),
    ]  # fmt: skip


def test_log_probabilities_have_the_shape_of_their_route(hosting, inference):
    first = {"token": "He", "bytes": [72, 101], "logprob": -0.5, "top": [["Ho", [72, 111], -0.4]]}
    second = {"token": "y", "bytes": [121], "logprob": -1.5, "top": []}
    alone = {"token": "S", "bytes": [83], "logprob": None, "top": []}
    start = START | {"echo": [{"index": 0, "text": "S", "logprobs": [alone]}]}
    inference.records = [START, token("Hey", logprobs=[first, second]), FINISH, END]

    chat = hosting.post(CHAT_URL, json=CHAT | {"logprobs": True, "top_logprobs": 1}).json()
    inference.records = [start, token("He", logprobs=[first]), token("y", logprobs=[second])]
    inference.records += [FINISH, END]
    asked = TEXT | {"logprobs": 1, "echo": True}
    text = hosting.post(TEXT_URL, json=asked).json()["choices"][0]
    *chunks, _ = read_data(hosting.post(TEXT_URL, json=asked | {"stream": True}))

    assert chat["choices"][0]["logprobs"]["content"][0] == {
        "token": "He", "bytes": [72, 101], "logprob": -0.5,
        "top_logprobs": [{"token": "Ho", "bytes": [72, 111], "logprob": -0.4}],
    }  # fmt: skip
    assert text["text"] == "SHey"
    assert text["logprobs"] == {
        "tokens": ["S", "He", "y"],
        "token_logprobs": [None, -0.5, -1.5],
        "top_logprobs": [None, {"Ho": -0.4, "He": -0.5}, {"y": -1.5}],
        "text_offset": [0, 1, 3],
    }
    pieces = [json.loads(each)["choices"][0]["logprobs"] for each in chunks]
    assert [each["text_offset"] for each in pieces if each] == [[0], [1], [3]]


def test_parts_of_a_character_start_where_it_does(hosting, inference):
    parts = [("bytes:\\xf0\\x9f", 0), ("bytes:\\x8e\\x89", 1), (" ok", 3), ("!", 1)]
    tokens = [
        {"token": text, "bytes": [], "characters": width, "logprob": -1.0, "top": []}
        for text, width in parts
    ]
    start = START | {"echo": [{"index": 0, "text": "🎉", "logprobs": tokens[:2]}]}
    inference.records = [start, token(" ok", logprobs=tokens[2:3])]
    inference.records += [token("!", logprobs=tokens[3:]), FINISH, END]
    asked = TEXT | {"logprobs": 0, "echo": True}

    whole = hosting.post(TEXT_URL, json=asked).json()["choices"][0]
    *chunks, _ = read_data(hosting.post(TEXT_URL, json=asked | {"stream": True}))

    assert whole["text"] == "🎉 ok!"
    assert whole["logprobs"]["text_offset"] == [0, 0, 1, 4]
    pieces = [json.loads(each)["choices"][0]["logprobs"] for each in chunks]
    assert [each["text_offset"] for each in pieces if each] == [[0, 0], [1], [4]]


def test_a_stream_counts_along_where_asked(hosting):
    options = {"include_usage": True, "continuous_usage_stats": True}

    response = hosting.post(TEXT_URL, json=TEXT | {"stream": True, "stream_options": options})

    *chunks, _ = read_data(response)
    totals = [json.loads(each)["usage"]["completion_tokens"] for each in chunks]
    assert totals == [1, 2, 2, 2]


def test_a_last_token_without_text_is_counted_where_its_answer_ends(hosting, inference):
    ends = [FINISH | {"tokens": 1}, END | {"completion_tokens": 1}]
    inference.records = [START, *ends]
    options = {"include_usage": True, "continuous_usage_stats": True}

    response = hosting.post(TEXT_URL, json=TEXT | {"stream": True, "stream_options": options})

    *chunks, _ = read_data(response)
    assert [json.loads(each)["usage"]["completion_tokens"] for each in chunks] == [1, 1]


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": {"url": "http://x"}}], 7, None]
)
def test_content_that_is_no_text_is_refused_by_its_place(hosting, inference, content):
    response = hosting.post(
        CHAT_URL, json=CHAT | {"messages": [{"role": "user", "content": content}]}
    )

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content"
    assert inference.requests == []


def test_an_unknown_model_is_404_in_openai_words(hosting):
    response = hosting.post(CHAT_URL, json=CHAT | {"model": "gpt-9"})

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "gpt-9" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "context_length_exceeded", "invalid_request_error"),
        (503, "overloaded", "server_error"),
        (503, "model_loading", "server_error"),
        (503, "draining", "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_inference_service_keeps_its_status_and_code(
    hosting, inference, status, code, kind, stream
):
    body = {"type": "error", "code": code, "message": "so it is", "param": None}
    inference.refusal = (status, body, {"Retry-After": "7"})

    response = hosting.post(CHAT_URL, json=CHAT | {"stream": stream})

    error = response.json()["error"]
    assert response.status_code == status
    assert (error["code"], error["type"], error["message"]) == (code, kind, "so it is")
    assert response.headers.get("retry-after") == ("7" if status == 503 else None)


def test_an_inference_service_that_is_down_is_503_with_retry_after(api):
    job_id, _ = api.artifact()
    with api.client() as client:
        made = client.post("/v1/deployments", json={"quantization_id": job_id, "name": "hosted"})
        response = client.post(CHAT_URL, json=CHAT | {"stream": True})

    assert (made.status_code, made.json()["status"]) == (201, "unknown")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "inference_unavailable"
    assert int(response.headers["retry-after"]) > 0


def test_a_fault_in_the_middle_of_a_stream_is_an_event_and_its_end(hosting, inference):
    fault = {"type": "error", "code": "internal_error", "message": "secret path", "param": None}
    inference.records = [START, token("Hel"), fault]

    streamed = read_data(hosting.post(CHAT_URL, json=CHAT | {"stream": True}))
    whole = hosting.post(CHAT_URL, json=CHAT)

    assert json.loads(streamed[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in streamed
    assert whole.status_code == 500
    assert "secret" not in streamed[-1] + whole.text


def test_a_guide_that_fails_on_the_way_is_the_callers_fault(hosting, inference):
    fault = {"type": "error", "code": "guide_failed", "message": "make it simpler"}
    fault["param"] = "guided_regex"
    inference.records = [START, token("bb"), fault]

    whole = hosting.post(CHAT_URL, json=CHAT)
    streamed = read_data(hosting.post(CHAT_URL, json=CHAT | {"stream": True}))

    assert whole.status_code == 400
    assert whole.json()["error"] == {
        "message": "make it simpler", "type": "invalid_request_error", "param": "guided_regex",
        "code": "guide_failed",
    }  # fmt: skip
    assert json.loads(streamed[-1]) == whole.json()


@pytest.mark.parametrize(
    ("records", "status"),
    [([], 503), ([{"type": "error", "code": "context_length_exceeded", "message": "m"}], 400)],
)
def test_a_generation_that_never_began_has_a_status_of_its_own(hosting, inference, records, status):
    inference.records = records

    response = hosting.post(CHAT_URL, json=CHAT | {"stream": True})

    assert response.status_code == status
    assert set(response.json()) == {"error"}


@pytest.mark.parametrize(
    ("status", "body", "answered", "message"),
    [
        (400, {"code": "invalid_request", "message": "too hot", "param": "top_p"}, 400, "too hot"),
        (500, {"code": "model_failed", "message": "a shard is damaged"}, 500, "a shard is damaged"),
        (500, {"code": "internal_error", "message": "/secret"}, 500, "The generation failed."),
        (502, "no record", 500, "The generation failed."),
        (401, {"code": "invalid_api_key", "message": "internal token"}, 503, "does not answer"),
        (503, {"code": "new_code", "message": "later"}, 503, "does not answer"),
    ],
)
def test_faults_between_the_two_services_are_told_to_whom_they_concern(
    hosting, inference, status, body, answered, message
):
    inference.refusal = (status, body, {})

    response = hosting.post(CHAT_URL, json=CHAT)

    error = response.json()["error"]
    assert response.status_code == answered
    assert message in error["message"]
    assert (error["code"] is None) == (answered == 500)


def test_a_stream_that_breaks_off_does_not_look_complete(hosting, inference):
    inference.records = [START, token("Hel")]

    streamed = read_data(hosting.post(CHAT_URL, json=CHAT | {"stream": True}))
    whole = hosting.post(CHAT_URL, json=CHAT)

    assert "error" in json.loads(streamed[-1])
    assert whole.status_code == 503


def test_a_pause_is_bridged_by_comments(hosting, inference, monkeypatch):
    monkeypatch.setattr("api.services.completions.KEEP_ALIVE_S", 0.1)
    inference.pause_s = 0.35

    response = hosting.post(CHAT_URL, json=CHAT | {"stream": True})

    assert response.text.count(": keep-alive") >= 2
    assert read_data(response)[-1] == "[DONE]"


@pytest.mark.parametrize("delay_s", [0, 5], ids=["while it streams", "before it begins"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_goes_away_cancels_the_generation(hosting, inference, delay_s, stream):
    inference.records = [START, *[token("x")] * 400, FINISH, END]
    inference.delay_s, inference.pause_s = delay_s, 0.05

    read_a_little_and_leave(hosting, CHAT | {"stream": stream})
    end = time.monotonic() + 10
    while not inference.cancelled and time.monotonic() < end:
        time.sleep(0.02)

    assert (inference.cancelled, inference.finished) == (1, 0)


@pytest.mark.parametrize("body", [[], "text", None])
def test_a_body_that_is_no_object_is_400(hosting, body):
    response = hosting.post(CHAT_URL, json=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_hosted_models_are_listed_and_read_by_name(hosting):
    listed = hosting.get("/v1/models").json()
    one = hosting.get("/v1/models/hosted").json()

    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == ["hosted"]
    assert one == listed["data"][0]
    assert one["object"] == "model"
    assert hosting.get("/v1/models/none").json()["error"]["code"] == "model_not_found"


def test_faults_outside_of_the_handlers_have_openais_shape_too(hosting):
    wrong_method = hosting.put(CHAT_URL, json=CHAT)
    too_large = hosting.post(CHAT_URL, json=CHAT | {"user": "x" * 5_000_000})

    assert (wrong_method.status_code, too_large.status_code) == (405, 413)
    assert all(set(each.json()) == {"error"} for each in (wrong_method, too_large))


def test_deployments_are_made_shown_and_removed(hosting, inference):
    listed = hosting.get("/v1/deployments").json()["data"]
    taken = hosting.post(
        "/v1/deployments", json={"artifact_id": listed[0]["artifact_id"], "name": "hosted"}
    )
    named = hosting.post("/v1/deployments", json={"artifact_id": listed[0]["artifact_id"]})
    url = f"/v1/deployments/{listed[0]['id']}"
    gone = [hosting.delete(url), hosting.delete(url)]

    assert (listed[0]["name"], listed[0]["status"], listed[0]["memory_bytes"]) == (
        "hosted", "ready", 1000,
    )  # fmt: skip
    assert (taken.status_code, taken.json()["code"]) == (409, "deployment_conflict")
    assert (named.status_code, named.json()["name"]) == (201, "tiny-w4a8")
    assert named.headers["location"] == f"/v1/deployments/{named.json()['id']}"
    assert [each.status_code for each in gone] == [200, 404]
    # the other name still hosts it
    assert inference.loaded == [named.json()["artifact_id"]]
    inference.loaded.clear()
    assert hosting.get(named.headers["location"]).json()["status"] == "idle"
    # it had left memory by itself: the inference service knows nothing to unload
    assert hosting.delete(named.headers["location"]).status_code == 200


def test_a_model_leaves_memory_and_comes_back_while_it_stays_hosted(hosting, inference):
    (deployment,) = hosting.get("/v1/deployments").json()["data"]
    url = f"/v1/deployments/{deployment['id']}"

    unloaded = hosting.post(f"{url}/unload")
    inference.progress = {"status": "loading", "stage": "reading", "progress": 0.4}
    loaded = hosting.post(f"{url}/load")

    assert (unloaded.status_code, unloaded.json()["status"]) == (200, "idle")
    assert (loaded.status_code, loaded.json()["status"]) == (202, "loading")
    assert (loaded.json()["stage"], loaded.json()["progress"]) == ("reading", 0.4)
    assert hosting.post("/v1/deployments/dep_none/load").status_code == 404


def test_the_last_name_of_an_artifact_takes_it_out_of_memory(hosting, inference):
    (deployment,) = hosting.get("/v1/deployments").json()["data"]
    assert inference.loaded == [deployment["artifact_id"]]

    gone = hosting.delete(f"/v1/deployments/{deployment['id']}")

    assert gone.json() == {"id": deployment["id"], "object": "deployment", "deleted": True}
    assert inference.loaded == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "invalid_request"),
        ({"artifact_id": "art_x", "quantization_id": "job_x"}, 422, "invalid_request"),
        ({"artifact_id": "art_x"}, 404, "artifact_not_found"),
        ({"quantization_id": "job_x"}, 404, "quantization_not_found"),
        ({"artifact_id": "art_x", "name": "../up"}, 422, "invalid_request"),
    ],
)
def test_a_deployment_of_nothing_is_refused(shared_api, body, status, code):
    with shared_api.client() as client:
        response = client.post("/v1/deployments", json=body)

    assert (response.status_code, response.json()["code"]) == (status, code)


def test_a_job_that_is_not_done_cannot_be_hosted(shared_api):
    job = shared_api.queue_job()

    with shared_api.client() as client:
        response = client.post("/v1/deployments", json={"quantization_id": job.id})

    assert (response.status_code, response.json()["code"]) == (409, "state_conflict")


def read_a_little_and_leave(client, body):
    try:
        with client.stream("POST", CHAT_URL, json=body, timeout=0.4) as response:
            next(response.iter_bytes())
    except httpx.ReadTimeout:
        # nothing came at all: the connection is closed just the same
        pass
