import json

import pytest

from engine.checkpoint.evaluation import (
    Evaluation,
    EvaluationStatus,
    TaskMeasurement,
    TextMeasurement,
)
from tests.unit.engine.evaluations import FAILED, SUCCEEDED, an_evaluation


def test_a_record_is_read_as_it_was_written():
    written = json.loads(json.dumps(an_evaluation().to_json()))

    assert Evaluation.from_json(written) == an_evaluation()


def test_a_record_of_an_earlier_engine_keeps_its_perplexity():
    perplexity = {"fp": 20.5, "quant": 22.25, "tokens": 4096, "dataset": "builtin"}

    read = Evaluation.from_json({"status": "succeeded", "perplexity": perplexity})

    assert read.status is EvaluationStatus.SUCCEEDED
    assert (read.perplexity.fp, read.perplexity.dataset) == (20.5, "builtin")


def test_a_failed_record_of_an_earlier_engine_has_no_text():
    read = Evaluation.from_json({"status": "failed", "perplexity": None})

    assert (read.status, read.texts, read.perplexity) == (EvaluationStatus.FAILED, (), None)


def test_the_first_measured_text_stands_for_all():
    assert an_evaluation().to_json()["perplexity"]["dataset"] == "wikitext2"
    assert an_evaluation().divergence.mean == 0.02


@pytest.mark.parametrize(
    ("texts", "tasks", "together"),
    [
        ([SUCCEEDED], [], "succeeded"),
        ([FAILED, FAILED], [FAILED], "failed"),
        ([SUCCEEDED, FAILED], [], "partial"),
        ([SUCCEEDED], [FAILED], "partial"),
        ([], [], "skipped"),
    ],
)
def test_the_status_says_whether_all_parts_came_out(texts, tasks, together):
    evaluation = Evaluation.of(
        [TextMeasurement(dataset="x", status=each) for each in texts],
        [TaskMeasurement(family="x", status=each) for each in tasks],
    )

    assert evaluation.status == together
