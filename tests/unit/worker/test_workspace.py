import json

import pytest
from pydantic import SecretStr

from api.db.tables.jobs import Job
from api.errors import InvalidRequest
from api.settings import HubSettings, Settings, WorkerSettings
from worker.job_file import describe_job
from worker.workspace import Workspace


@pytest.fixture
def attempt(tmp_path):
    """Make the workspace of an attempt with something in every folder."""

    def make(number):
        workspace = Workspace(work_dir=tmp_path, job_id="job_1", attempt=number)
        workspace.prepare()
        (workspace.source / "config.json").write_text("{}")
        (workspace.state / "layer-0.safetensors").write_bytes(b"12345")
        workspace.output.mkdir()
        (workspace.output / "model.safetensors").write_bytes(b"123")
        return workspace

    return make


def test_a_new_attempt_keeps_layers_and_source_and_drops_outputs(attempt):
    first = attempt(1)
    first.log.write_text("Traceback")

    second = Workspace(work_dir=first.work_dir, job_id="job_1", attempt=2)
    second.prepare()

    assert (second.state / "layer-0.safetensors").exists()
    assert (second.source / "config.json").exists()
    assert not first.output.exists()
    assert first.log.exists()


def test_a_half_written_output_is_dropped_as_well(attempt):
    workspace = attempt(1)
    (workspace.attempt_dir / "artifact.partial").mkdir()

    workspace.drop_output()

    assert not list(workspace.attempt_dir.glob("artifact*"))
    assert (workspace.state / "layer-0.safetensors").exists()


def test_what_a_job_holds_already_is_counted(attempt):
    assert attempt(1).used_bytes() == len("{}") + 5 + 3


def test_a_finished_job_leaves_nothing(attempt):
    workspace = attempt(1)

    workspace.drop_all()

    assert not workspace.root.exists()
    assert workspace.work_dir.exists()


def make_job(**fields):
    wanted = {
        "id": "job_1",
        "model": "acme/tiny",
        "source_sha": "f" * 40,
        "spec": {"w_bits": 4, "calibration": {"dataset": "local:texts/a.txt"}},
        "evaluation": {"enabled": True, "windows": 2, "length": 128},
    }
    return Job(**(wanted | fields))


def test_the_child_is_told_paths_and_never_a_secret(attempt, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    settings = Settings(
        hub=HubSettings(token=SecretStr("hf_secret"), text_roots={"texts": tmp_path}),
        worker=WorkerSettings(threads=2, device="cpu"),
    )
    workspace = attempt(1)

    description = describe_job(make_job(), workspace, settings, {})

    written = workspace.write_job_file(description).read_text()
    assert json.loads(written) == description
    assert "hf_secret" not in written
    assert description["calibration_text"] == str(tmp_path / "a.txt")
    assert description["evaluation_texts"] == [{"name": "builtin", "path": None, "error": None}]
    assert description["evaluation"] == {
        "enabled": True,
        "windows": 2,
        "length": 128,
        "divergence": True,
        "tasks": [],
        "task_dir": None,
    }
    assert (description["threads"], description["device"]) == (2, "cpu")


def test_a_text_that_has_vanished_since_is_named(attempt, tmp_path):
    settings = Settings(hub=HubSettings(text_roots={"texts": tmp_path}))

    with pytest.raises(InvalidRequest, match=r"local:texts/a\.txt") as refused:
        describe_job(make_job(), attempt(1), settings, {})

    assert refused.value.param == "spec.calibration.dataset"


def test_texts_of_the_hub_are_told_by_path_and_missing_ones_by_reason(attempt, tmp_path):
    workspace = attempt(1)
    evaluation = {"datasets": ["wikitext2", "c4", "local:texts/gone.txt"], "tasks": ["piqa"]}
    job = make_job(spec={"w_bits": 4, "calibration": {"dataset": "c4"}}, evaluation=evaluation)
    settings = Settings(
        hub=HubSettings(text_roots={"texts": tmp_path}),
        worker=WorkerSettings(task_dir=tmp_path / "tasks"),
    )

    description = describe_job(job, workspace, settings, {"c4": "the Hub is away"})

    assert description["calibration_text"] == str(workspace.texts / "c4-calibration.txt")
    found, missing, gone = description["evaluation_texts"]
    assert found == {
        "name": "wikitext2",
        "path": str(workspace.texts / "wikitext2-evaluation.txt"),
        "error": None,
    }
    assert missing == {"name": "c4", "path": None, "error": "the Hub is away"}
    assert gone["path"] is None
    assert "There is no local:texts/gone.txt" in gone["error"]
    assert description["evaluation"]["tasks"] == ["piqa"]
    assert description["evaluation"]["task_dir"] == str(tmp_path / "tasks")
