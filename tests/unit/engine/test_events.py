import json

import pytest

from engine.events import LayerFinished, LogLine, Stage, StageStarted, encode_event


def test_an_event_is_one_line_with_its_type_and_fields():
    line = encode_event(StageStarted(stage=Stage.CALIBRATING))

    assert json.loads(line) == {"type": "stage.started", "stage": "calibrating"}


def test_a_newline_in_a_message_stays_on_the_line():
    line = encode_event(LogLine(level="info", message="two\nlines"))

    assert "\n" not in line
    assert json.loads(line)["message"] == "two\nlines"


def test_a_loss_that_is_not_a_number_is_no_json():
    event = LayerFinished(
        index=0, total=1, name="model.layers.0", loss_before=float("nan"), loss_after=0.0,
        seconds=1.0, memory_bytes=1,
    )  # fmt: skip

    with pytest.raises(ValueError, match="JSON"):
        encode_event(event)
