"""What a worker does with jobs that go well, go wrong, or are no longer wanted."""

import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from api.db.tables.jobs import JobStatus
from api.schemas.quantizations import Quantization
from api.services.jobs import cancel_job, retry_job
from tests.integration.machine import QUICK, TOKEN, wait_until
from tests.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.parametrize("form", ["files"], indirect=True)


@pytest.fixture
def poisoned(models):
    """A model whose second decoder layer is too large to be rotated."""
    folder = save_tiny_llama(models / "poisoned", layers=2)
    weights = load_file(folder / "model.safetensors")
    # finite, or it would be refused before any layer
    weights["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "local:models/poisoned"


def test_a_job_goes_through_its_stages_and_leaves_only_its_artifact(machine, dispatcher):
    machine.start("worker")

    job = machine.wait_for_end(machine.create_job(spec=QUICK))

    assert [event.data["stage"] for event in machine.events(job.id, "stage.started")] == [
        "validating", "downloading", "calibrating", "packing", "evaluating", "uploading"
    ]  # fmt: skip
    assert job.report["perplexity"]["tokens"] > 0
    artifact = machine.artifact(job)
    assert artifact.manifest_sha256 == job.report["manifest_sha256"]
    stored = machine.settings.storage_root / artifact.id
    assert sum(path.stat().st_size for path in stored.iterdir()) == artifact.bytes
    wait_until(lambda: not (machine.settings.work_dir / job.id).exists(), "the work was kept", 5)


def test_a_job_with_a_target_searches_its_bits_and_shows_them(machine, dispatcher):
    machine.start("worker")
    target = {"average_bits": 4.0, "w_choices": [2, 4, 8]}

    job = machine.wait_for_end(machine.create_job(spec=QUICK | {"target": target}))

    assert machine.artifact(job)
    stages = [event.data["stage"] for event in machine.events(job.id, "stage.started")]
    assert stages[2:4] == ["searching", "calibrating"]
    assert 3.5 < job.report["bits_per_weight"] <= 4.0
    shown = Quantization.of(job).report["search"]
    assert shown["predicted_average_bits"] == job.report["bits_per_weight"]
    assert {w_bits for w_bits, _ in shown["bits"].values()} > {2}
    [chosen] = machine.events(job.id, "bits.chosen")
    assert chosen.data["bits"] == shown["bits"]


def test_cancelling_a_calibration_takes_seconds_and_a_retry_goes_on_behind_its_last_layer(
    machine, dispatcher
):
    machine.start("worker")
    job_id = machine.create_job()
    machine.wait_for_layer(job_id, 1)

    asked = time.monotonic()
    cancel_job(machine.database, machine.tenant_id, job_id)
    job = machine.wait_for_end(job_id)

    assert time.monotonic() - asked < 20
    assert job.status == JobStatus.CANCELLED
    assert not machine.children()
    assert machine.artifact_folders() == []
    assert not list(machine.settings.work_dir.glob(f"{job_id}/attempt-1/artifact*"))
    assert not (machine.settings.work_dir / job_id / "source").exists()
    assert list((machine.settings.work_dir / job_id / "state").iterdir())

    retry_job(machine.database, machine.settings, machine.tenant_id, job_id)
    wait_until(lambda: machine.job(job_id).status != JobStatus.CANCELLED, "not queued", 5)
    job = machine.wait_for_end(job_id)

    assert job.status == JobStatus.SUCCEEDED
    assert machine.resumed_layers(job_id)[:2] == [0, 1]


def test_a_worker_that_is_told_to_stop_gives_its_job_back_uncounted(machine, dispatcher):
    worker = machine.start("worker")
    job_id = machine.create_job()
    machine.wait_for_layer(job_id, 0)

    worker.terminate()
    code = worker.wait(45)

    job = machine.job(job_id)
    assert code == 0
    assert job.status == JobStatus.QUEUED
    assert machine.attempts(job_id) == ["released"]
    assert job.max_attempts - job.attempt == machine.settings.worker.max_attempts
    assert not machine.children()


def test_a_diverging_calibration_names_the_layer_and_keeps_what_it_had(
    machine, dispatcher, poisoned
):
    machine.start("worker")
    job_id = machine.create_job(model=poisoned)

    job = machine.wait_for_end(job_id)

    assert job.status == JobStatus.FAILED
    assert job.error["code"] == "calibration_diverged"
    assert "layers.1" in job.error["layer"]
    assert machine.attempts(job_id) == ["calibration_diverged"]
    assert list((machine.settings.work_dir / job_id / "state").iterdir())


def test_the_hub_token_stays_in_the_supervisor(machine, dispatcher):
    machine.start("worker")
    job_id = machine.create_job()
    child = Path("/proc") / str(machine.wait_for_child(job_id))
    environment, command = (child / "environ").read_bytes(), (child / "cmdline").read_bytes()
    machine.wait_for_layer(job_id, 0)

    on_disk = b""
    for path in machine.settings.data_dir.parent.rglob("*"):
        with suppress(OSError):
            on_disk += path.read_bytes() if path.is_file() else b""

    assert b"worker.child" in command
    assert b"PATH=" in environment
    assert b"job.started" in on_disk
    assert b"ABQ_" not in environment
    assert TOKEN.encode() not in environment + command + on_disk
