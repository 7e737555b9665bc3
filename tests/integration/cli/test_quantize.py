import json

from tests.running_api import RunningApi

MODEL = "local:models/tiny"
# the model has 256 positions
SHORT = ("--set", "calibration.length=64", "--window-length", 64)


def stored_jobs(api: RunningApi):
    with api.client() as client:
        return client.get("/v1/quantizations").json()["data"]


def test_a_job_is_asked_for_by_notation(abq, api):
    job = abq("quantize", MODEL, "w3a8g32", *SHORT, "--json").json

    assert job["status"] == "queued"
    assert job["notation"] == "w3a8g32"
    assert [each["id"] for each in stored_jobs(api)] == [job["id"]]


def test_single_fields_are_laid_over_the_notation(abq):
    options = ("--set", "calibration.epochs=2", "--set", "recipe=rtn", "--set", "symmetric=true")

    spec = abq("quantize", MODEL, "w4a8", *SHORT, *options, "--json").json["spec"]

    assert spec["w_bits"] == 4
    assert spec["calibration"]["epochs"] == 2
    assert spec["recipe"] == "rtn"
    assert spec["symmetric"] is True


def test_a_target_is_laid_over_the_notation(abq):
    options = ("--set", "target.average_bits=3.5", "--set", "target.w_choices=[2,3,4]")

    spec = abq("quantize", MODEL, "w4a8", *SHORT, *options, "--json").json["spec"]

    assert (spec["w_bits"], spec["a_bits"]) == (4, 8)
    assert spec["target"]["average_bits"] == 3.5
    assert spec["target"]["w_choices"] == [2, 3, 4]


def test_a_spec_is_read_from_a_file(abq, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"w_bits": 5, "group_size": 32}))

    job = abq("quantize", MODEL, path, *SHORT, "--json").json

    assert job["notation"] == "w5a16g32"


def test_labels_and_evaluation_reach_the_job(abq):
    options = ("--label", "team=a", "--windows", 0)

    job = abq("quantize", MODEL, "w4a8", *SHORT, *options, "--json").json

    assert job["labels"] == {"team": "a"}
    assert job["evaluation"]["enabled"] is False


def test_texts_and_tasks_reach_the_job(abq):
    options = ("--text", "wikitext2", "--text", "builtin", "--task", "piqa", "--task", "arc")

    job = abq("quantize", MODEL, "w4a8", *SHORT, *options, "--json").json

    assert job["evaluation"]["datasets"] == ["wikitext2", "builtin"]
    assert job["evaluation"]["tasks"] == ["piqa", "arc"]
    assert job["evaluation"]["divergence"] is True


def test_an_estimate_starts_nothing(abq, api):
    table = abq("quantize", MODEL, "w4a8", *SHORT, "--estimate")
    record = abq("quantize", MODEL, "w4a8", *SHORT, "--estimate", "--json").json

    assert table.code == 0
    assert "bits per weight" in table.out
    assert record["notation"] == "w4a8"
    assert stored_jobs(api) == []


def test_bits_out_of_range_are_refused_with_field_and_remedy(abq, api):
    answer = abq("quantize", MODEL, "w9a8")

    assert answer.code == 1
    assert "w_bits" in answer.err
    assert "1 to 8" in answer.err
    assert stored_jobs(api) == []


def test_an_unknown_field_is_refused_by_its_name(abq, api):
    answer = abq("quantize", MODEL, "w4a8", "--set", "bits=4")

    assert answer.code == 1
    assert "bits" in answer.err
    assert stored_jobs(api) == []


def test_a_text_longer_than_the_model_reads_is_refused(abq):
    answer = abq("quantize", MODEL, "w4a8", *SHORT, "--set", "calibration.length=512")

    assert answer.code == 1
    assert "length = 512" in answer.err
    assert "256 positions" in answer.err


def test_a_missing_model_is_refused_by_its_name(abq):
    answer = abq("quantize", "local:models/missing", "w4a8")

    assert answer.code == 1
    assert "missing" in answer.err


def test_an_unreadable_file_is_one_line(abq, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text("{")

    answer = abq("quantize", MODEL, path)

    assert answer.code == 1
    assert str(path) in answer.err
