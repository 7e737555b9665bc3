from io import StringIO

import pytest
from rich.console import Console

from api.cli.events import JobEvent
from api.cli.progress import LAYERS_SHOWN, JobPicture, event_line


def event(kind, **data):
    return JobEvent(id="1", type=kind, data=data)


def finished(index, **others):
    data = {"index": index, "total": 30, "name": f"model.layers.{index}", "loss_before": 0.5}
    data |= {"loss_after": 0.25, "seconds": 1.5, "memory_bytes": 10**9, "resumed": False}
    return event("layer.finished", **(data | others))


def drawn(picture):
    console = Console(file=StringIO(), width=120)
    console.print(picture)
    return console.file.getvalue()


CHOSEN = event(
    "bits.chosen", average_bits=3.5, predicted_loss=0.043, bits={"a": [2, 8], "b": [4, 8]}
)


@pytest.fixture
def picture():
    return JobPicture("acme/tiny w4a8")


def test_a_queued_job_waits(picture):
    assert "waiting for a worker" in drawn(picture)


def test_a_running_job_shows_stage_layer_and_losses(picture):
    for each in (event("job.started"), event("stage.started", stage="calibrating"), finished(0)):
        picture.apply(each)

    text = drawn(picture)

    assert "running" in text
    assert "calibrating" in text
    assert "layer 1 of 30" in text
    assert "-50 %" in text


def test_only_the_latest_layers_are_shown(picture):
    for index in range(LAYERS_SHOWN + 5):
        picture.apply(finished(index))

    text = drawn(picture)

    assert f"{LAYERS_SHOWN + 5}/30" in text
    assert " 5/30" not in text


def test_the_bits_that_a_search_chose_are_told(picture):
    picture.apply(event("stage.started", stage="searching"))
    picture.apply(CHOSEN)

    assert "1 w2a8, 1 w4a8" in drawn(picture)


def test_a_download_is_counted_in_bytes(picture):
    picture.apply(event("download.progress", bytes=5_000_000, total=10_000_000))

    assert "5.0 MB of 10.0 MB" in drawn(picture)


def test_a_lost_worker_puts_the_job_back_in_the_queue(picture):
    picture.apply(event("job.started"))
    picture.apply(event("job.requeued", reason="worker_lost"))

    text = drawn(picture)

    assert "queued" in text
    assert "waiting for a worker" in text


def test_a_resumed_layer_says_so(picture):
    picture.apply(finished(0, resumed=True))

    assert "from checkpoint" in drawn(picture)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (event("stage.started", stage="packing"), "stage      packing"),
        (event("job.requeued"), "job        requeued"),
        (event("job.failed", error={"message": "disk full"}), "failed     disk full"),
        (event("checkpoint.saved", index=1), None),
        (CHOSEN, "bits       3.500 bits per weight (layers: 1 w2a8, 1 w4a8), KL 0.043"),
        (
            event("eval.result", metric="perplexity", fp=20, quant=21.5, tokens=9, dataset="c4"),
            "evaluation perplexity 20.000 -> 21.500 on c4",
        ),
        (
            # as an earlier engine told it
            event("eval.result", metric="perplexity", fp=20, quant=21.5, tokens=9),
            "evaluation perplexity 20.000 -> 21.500",
        ),
        (
            event("eval.divergence", dataset="c4", mean=0.02, p99=1, max=2, top1_agreement=0.9),
            "evaluation KL 0.0200 a token, 90.0 % the same on c4",
        ),
        (finished(2), "layer      3/30  loss 0.5 -> 0.25  1.5 s"),
    ],
)
def test_an_event_is_one_line_or_none(told, line):
    assert event_line(told) == line
