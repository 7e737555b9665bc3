import pytest

from engine.calibration.watch import Watch
from engine.errors import CalibrationInterrupted
from engine.events import LogLine, Progress, Stage


@pytest.fixture
def events():
    return []


def test_a_stop_is_an_interruption(events):
    Watch(on_event=events.append, should_stop=lambda: False).check()

    with pytest.raises(CalibrationInterrupted):
        Watch(on_event=events.append, should_stop=lambda: True).check()


def test_progress_comes_rarely_but_always_at_the_end(events):
    watch = Watch(on_event=events.append)

    for done in range(1, 1001):
        watch.progress(Stage.CALIBRATING, done, 1000, "step")

    assert [each.done for each in events if each.done in (1, 1000)] == [1, 1000]
    # a thousand calls take far less than the half second between two reports
    assert len(events) < 10


def test_parts_of_a_stage_add_up_to_one_count(events):
    Watch(on_event=events.append, part=1, parts=2).progress(Stage.EVALUATING, 6, 6, "block")

    assert events == [Progress(stage=Stage.EVALUATING, done=12, total=12, unit="block")]


def test_a_sentence_is_a_log_line(events):
    Watch(on_event=events.append).say("hello")

    assert events == [LogLine(level="info", message="hello")]
