from api.cli.job_text import job_facts

JOB = {
    "status": "succeeded",
    "model": "acme/tiny",
    "notation": "w4a8",
    "labels": {},
    "attempt": 1,
    "max_attempts": 3,
    "created_at": None,
}
REPORT = {"bytes_fp": 1000, "bytes_quant": 300, "bits_per_weight": 3.5}
SEARCH = {"predicted_average_bits": 3.5, "predicted_loss": 0.02, "bits": {"a": [3, 8], "b": [4, 8]}}


def test_a_job_with_a_target_tells_the_bits_that_were_found():
    facts = job_facts(
        JOB | {"report": REPORT | {"promised_bits_per_weight": 3.5, "search": SEARCH}}
    )

    assert facts["searched"] == "3.500 bits per weight (layers: 1 w3a8, 1 w4a8), KL 0.02"


def test_a_job_without_a_target_tells_nothing_of_a_search():
    assert job_facts(JOB | {"report": None})["searched"] == ""
    # a report from before there were searches
    assert job_facts(JOB | {"report": REPORT | {"promised_bits_per_weight": 3.5}})["searched"] == ""
