"""Jobs from the Hub and back to it, through a real worker."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from api.db.tables.jobs import JobStatus
from api.services.jobs import cancel_job
from api.settings import HubSettings
from tests.fake_hub import WRITER, Trouble
from tests.hub_texts import add_texts
from tests.integration.machine import QUICK, wait_until

pytestmark = pytest.mark.parametrize("form", ["files"], indirect=True)

TARGET = "acme/tiny-w4a8"
PUBLISH = {"repo_id": TARGET, "private": True}


@pytest.fixture
def machine(open_machine, machine_settings, fake_hub, models):
    files = {path.name: path.read_bytes() for path in (models / "tiny").iterdir()}
    fake_hub.add("acme/tiny", files, card={"license": "mit"}, gated=True)
    hub = HubSettings(endpoint=fake_hub.url, token=SecretStr(WRITER))
    return open_machine(machine_settings.model_copy(update={"hub": hub}))


class CommandLines:
    """Collects the command lines of all processes while a block runs."""

    def __init__(self):
        self.seen = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def _look(self):
        while not self._stopped.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                # it may end between any two looks
                with suppress(OSError):
                    self.seen.add(path.read_bytes())


def test_a_gated_model_is_pushed_as_one_tagged_commit_and_the_token_is_found_at_the_hub_alone(
    machine, dispatcher, fake_hub, tmp_path
):
    with CommandLines() as command_lines:
        machine.start("worker")
        job_id = machine.create_job(model="acme/tiny", spec=QUICK, publish=PUBLISH)
        job = machine.wait_for_end(job_id)
        # it sweeps up behind the job; nothing may vanish while the files are read
        machine.stop()

    artifact = machine.artifact(job)
    repository = fake_hub.repositories[TARGET]
    assert repository.tags == {job.id: artifact.hub_commit["revision"]}
    assert artifact.hub_commit["repo_id"] == TARGET
    pushed = repository.commits[repository.head]
    assert {"README.md", "abq_manifest.json", "config.json"} <= set(pushed)
    stored = machine.settings.storage_root / artifact.id
    for path in stored.iterdir():
        assert pushed[path.name].sha256 == pushed[path.name].of(path.read_bytes()).sha256
    manifest = json.loads((stored / "abq_manifest.json").read_text())
    assert manifest["source"] == {"repo": "acme/tiny", "revision": job.source_sha}
    assert machine.events(job.id, "download.progress")
    token = WRITER.encode()
    assert f"Bearer {WRITER}" in {each.authorization for each in fake_hub.requests}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("abq.db" in path.name for path in files)
    assert [path for path in files if token in path.read_bytes()] == []
    assert any(b"worker.child" in line for line in command_lines.seen)
    assert [line for line in command_lines.seen if token in line] == []


def test_cancelling_a_download_takes_seconds_and_publishes_nothing(machine, dispatcher, fake_hub):
    job_id = machine.create_job(model="acme/tiny", spec=QUICK, publish=PUBLISH)
    fake_hub.inject(Trouble.STALLED, "model.safetensors", skip=1, times=1000, amount=1)
    machine.start("worker")
    wait_until(lambda: machine.events(job_id, "download.progress"), "no download started")

    asked = time.monotonic()
    cancel_job(machine.database, machine.tenant_id, job_id)
    job = machine.wait_for_end(job_id)

    assert time.monotonic() - asked < 20
    assert job.status == JobStatus.CANCELLED
    assert TARGET not in fake_hub.repositories
    assert machine.artifact_folders() == []


def test_a_push_that_is_refused_costs_neither_the_artifact_nor_a_half_repository(
    machine, dispatcher, fake_hub
):
    fake_hub.inject(Trouble.REFUSED, "/commit/")
    machine.start("worker")

    job = machine.wait_for_end(machine.create_job(model="acme/tiny", spec=QUICK, publish=PUBLISH))

    assert job.status == JobStatus.SUCCEEDED
    assert job.report["publish_error"]["code"] == "invalid_request"
    assert TARGET in job.report["publish_error"]["message"]
    assert machine.artifact_folders() == [job.artifact_id]
    repository = fake_hub.repositories[TARGET]
    assert set(repository.commits[repository.head]) == {".gitattributes"}


def test_texts_of_the_hub_calibrate_and_measure_and_a_missing_one_costs_itself_alone(
    machine, dispatcher, fake_hub
):
    add_texts(fake_hub)
    del fake_hub.repositories["datasets/allenai/c4"]
    spec = {**QUICK, "calibration": {**QUICK["calibration"], "dataset": "ptb"}}
    evaluation = {"enabled": True, "windows": 1, "length": 64, "datasets": ["wikitext2", "c4"]}
    wanted = replace(machine.new_job(model="acme/tiny", spec=spec), evaluation=evaluation)
    machine.start("worker")

    job = machine.wait_for_end(machine.queue(wanted))

    assert job.status == JobStatus.SUCCEEDED, job.error
    measured, missing = job.report["evaluation"]["texts"]
    assert job.report["evaluation_status"] == "partial"
    assert (measured["dataset"], measured["status"]) == ("wikitext2", "succeeded")
    assert measured["divergence"]["mean"] > 0
    assert (missing["dataset"], missing["status"]) == ("c4", "failed")
    assert "allenai/c4" in missing["message"]
    [failed] = machine.events(job.id, "eval.failed")
    assert failed.data["part"] == "c4"
    said = [event.data["message"] for event in machine.events(job.id, "log")]
    assert any("ptb-calibration.txt" in each for each in said)


def test_a_calibration_text_that_is_gone_fails_the_job_by_name(machine, dispatcher, fake_hub):
    spec = {**QUICK, "calibration": {**QUICK["calibration"], "dataset": "wikitext2"}}
    machine.start("worker")

    job = machine.wait_for_end(machine.create_job(model="acme/tiny", spec=spec))

    assert job.status == JobStatus.FAILED
    assert job.error["code"] == "dataset_unavailable"
    assert "Salesforce/wikitext" in job.error["message"]
