import io
import json
import logging

import pytest

from api.auth import new_key
from api.telemetry import Metrics, bind_context, configure_logging, get_logger, redact


@pytest.fixture
def lines():
    """Reads what was logged so far, one object a line."""
    stream, root = io.StringIO(), logging.getLogger()
    before = (root.level, root.handlers[:])
    root.handlers[:] = []
    configure_logging("info", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_a_line_is_an_event_its_fields_and_what_was_bound(lines):
    with bind_context(request_id="req_1"), bind_context(job_id="job_1"):
        get_logger("abq.test").info("layer_quantized", layer=7, loss=0.013)
    get_logger("abq.test").info("later")

    first, second = lines()
    assert (first["event"], first["layer"], first["loss"]) == ("layer_quantized", 7, 0.013)
    assert (first["request_id"], first["job_id"], first["level"]) == ("req_1", "job_1", "info")
    assert "request_id" not in second


def test_fields_of_plain_loggers_are_kept(lines):
    logging.getLogger("elsewhere").warning("broker_unreachable", extra={"error": "refused"})

    assert lines()[0]["error"] == "refused"


def test_an_exception_comes_with_its_traceback(lines):
    try:
        int("what was wrong")
    except ValueError:
        get_logger("abq.test").exception("it_failed")

    assert "ValueError: invalid literal" in lines()[0]["traceback"]


def test_what_is_below_the_level_is_not_written(lines):
    get_logger("abq.test").debug("detail")

    assert lines() == []


def test_keys_and_tokens_never_reach_the_log(lines):
    key, token = new_key(), "hf_" + "a1B2" * 9

    get_logger("abq.test").error("refused", header=f"Bearer {key}", nested={"token": token})
    logging.getLogger("lib").error("failed with %s", token)

    text = json.dumps(lines())
    assert key not in text
    assert token not in text
    assert text.count("[redacted]") == 3


def test_words_that_only_look_alike_are_left_alone():
    text = "hf_transfer abq_live_ model.hf_config"

    assert redact(text) == text


def test_two_apps_in_one_process_do_not_share_their_metrics():
    first, second = Metrics(), Metrics()

    first.observe_request("GET", "/v1/quantizations/{job_id}", 200, 0.02)

    wanted = b'_count{method="GET",route="/v1/quantizations/{job_id}",status="200"} 1.0'
    assert wanted in first.render()
    assert wanted not in second.render()
