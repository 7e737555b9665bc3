"""A finished job in words."""

import pytest

from api.cli.job_text import job_facts
from tests.unit.engine.evaluations import an_evaluation

REPORT = {
    "bits_per_weight": 4.035,
    "promised_bits_per_weight": 4.035,
    "bytes_fp": 269_030_016,
    "bytes_quant": 110_244_096,
    "perplexity": {"fp": 20.5, "quant": 22.25, "tokens": 4096},
    "evaluation_status": "partial",
    "evaluation": an_evaluation().to_json(),
    "seconds": 153.2,
}


@pytest.fixture
def job():
    return {
        "status": "succeeded", "model": "acme/tiny", "source_sha": "f" * 40, "notation": "w4a8",
        "labels": {}, "attempt": 1, "max_attempts": 3, "created_at": None, "report": REPORT,
    }  # fmt: skip


def test_every_measured_part_is_said_and_every_missing_one_with_its_reason(job):
    facts = job_facts(job)

    assert facts["perplexity"] == "20.50 -> 22.25 (+8.5 %) on wikitext2"
    assert facts["predictions"] == "KL 0.0200 a token, 93.8 % the same"
    assert facts["tasks"] == "piqa acc 50.0 -> 25.0 %"
    assert facts["not measured"] == "c4: the Hub did not answer; boolq: no data"


def test_a_report_of_an_earlier_version_has_its_perplexity_alone(job):
    job["report"] = {name: value for name, value in REPORT.items() if name != "evaluation"}

    facts = job_facts(job)

    assert facts["perplexity"] == "20.50 -> 22.25 (+8.5 %)"
    assert facts["predictions"] == facts["tasks"] == facts["not measured"] == ""


def test_a_job_that_measured_nothing_says_nothing_of_it(job):
    job["report"] = REPORT | {
        "perplexity": None,
        "evaluation": {"status": "skipped", "texts": [], "tasks": [], "layer_errors": []},
    }

    assert job_facts(job)["perplexity"] == ""


SEARCHED_JOB = {
    "status": "succeeded",
    "model": "acme/tiny",
    "notation": "w4a8",
    "labels": {},
    "attempt": 1,
    "max_attempts": 3,
    "created_at": None,
}
SIZES = {"bytes_fp": 1000, "bytes_quant": 300, "bits_per_weight": 3.5}
SEARCH = {"predicted_average_bits": 3.5, "predicted_loss": 0.02, "bits": {"a": [3, 8], "b": [4, 8]}}


def test_a_job_with_a_target_tells_the_bits_that_were_found():
    facts = job_facts(
        SEARCHED_JOB | {"report": SIZES | {"promised_bits_per_weight": 3.5, "search": SEARCH}}
    )

    assert facts["searched"] == "3.500 bits per weight (layers: 1 w3a8, 1 w4a8), KL 0.02"


def test_a_job_without_a_target_tells_nothing_of_a_search():
    assert job_facts(SEARCHED_JOB | {"report": None})["searched"] == ""
    # a report from before there were searches
    assert (
        job_facts(SEARCHED_JOB | {"report": SIZES | {"promised_bits_per_weight": 3.5}})["searched"]
        == ""
    )
