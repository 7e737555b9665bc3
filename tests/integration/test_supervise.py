"""Jobs with a Hub at both ends; the supervisor runs in a thread."""

import threading
import time

import pytest
from pydantic import SecretStr

from api.db.connection import Database
from api.db.tables.jobs import JobStatus
from api.hub.routing import create_hub, create_texts
from api.services.jobs import cancel_job
from api.storage.local import create_store
from tests.fake_hub import WRITER, Trouble
from tests.integration.machine import QUICK, wait_until
from tests.tiny_llama import save_tiny_llama
from worker.lifeline import Lifeline
from worker.supervise import Supervisor

pytestmark = [
    pytest.mark.parametrize("form", ["files"], indirect=True),
    # huggingface_hub 2.4 and its own HTTP client disagree
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

MODEL = "acme/tiny"
TARGET = {"repo_id": "acme/tiny-w4", "private": True}


@pytest.fixture
def repository(fake_hub, models):
    source = models / "small"
    if not source.exists():
        save_tiny_llama(source, layers=2)
    return fake_hub.add(MODEL, {path.name: path.read_bytes() for path in source.iterdir()})


@pytest.fixture
def hub_machine(machine_settings, fake_hub, repository, open_machine):
    hub = machine_settings.hub.model_copy(
        update={"endpoint": fake_hub.url, "token": SecretStr(WRITER)}
    )
    return open_machine(machine_settings.model_copy(update={"hub": hub}))


@pytest.fixture
def supervisor(hub_machine):
    """Runs claimable jobs in a thread until its lifeline is cut."""
    database = Database(hub_machine.settings.database_url)
    lifeline = Lifeline.open()
    made = Supervisor(
        settings=hub_machine.settings,
        database=database,
        hub=create_hub(hub_machine.settings),
        texts=create_texts(hub_machine.settings),
        store=create_store(hub_machine.settings),
        lifeline=lifeline,
        worker="here",
    )

    def work():
        while not lifeline.wait(0.05):
            made.run_until_idle()

    thread = threading.Thread(target=work)
    thread.start()
    yield made
    lifeline.let_go()
    thread.join()
    database.close()


def cancel(machine, job_id):
    """Cancel a job and return how long it took to end."""
    asked = time.monotonic()
    cancel_job(machine.database, machine.tenant_id, job_id)
    assert machine.wait_for_end(job_id).status == JobStatus.CANCELLED
    return time.monotonic() - asked


def wait_for_stage(machine, job_id, stage):
    wait_until(lambda: machine.job(job_id).stage == stage, lambda: f"no {stage}; {machine.log()}")


def test_cancelling_a_download_takes_seconds_and_leaves_no_source(
    hub_machine, supervisor, fake_hub
):
    fake_hub.inject(Trouble.SLOW, "model.safetensors", times=99, amount=0.5, skip=2)
    job_id = hub_machine.create_job(model=MODEL, spec=QUICK)
    wait_for_stage(hub_machine, job_id, "downloading")

    assert cancel(hub_machine, job_id) < 20

    stages = [event.data["stage"] for event in hub_machine.events(job_id, "stage.started")]
    assert stages == ["validating", "downloading"]
    assert not (hub_machine.settings.work_dir / job_id / "source").exists()


def test_a_hub_that_is_away_for_a_moment_costs_no_attempt(hub_machine, supervisor, fake_hub):
    job_id = hub_machine.create_job(model=MODEL, spec=QUICK)
    fake_hub.inject(Trouble.DOWN, "tokenizer.json", times=2)

    job = hub_machine.wait_for_end(job_id)

    assert job.status == JobStatus.SUCCEEDED
    assert hub_machine.attempts(job_id) == ["succeeded"]


def test_cancelling_an_upload_leaves_nothing_half_published(hub_machine, supervisor, fake_hub):
    fake_hub.inject(Trouble.DOWN, "/commit/", times=999)
    job_id = hub_machine.create_job(model=MODEL, spec=QUICK, publish=TARGET)
    wait_for_stage(hub_machine, job_id, "uploading")
    wait_until(lambda: any("/commit/" in p for p in fake_hub.paths("POST")), "no commit was tried")

    assert cancel(hub_machine, job_id) < 20

    pushed = fake_hub.repositories["acme/tiny-w4"]
    assert all("config.json" not in files for files in pushed.commits.values())
    assert hub_machine.artifact_folders() == []


def test_a_model_that_has_vanished_fails_the_job_at_once(hub_machine, supervisor, fake_hub):
    wanted = hub_machine.new_job(model=MODEL, spec=QUICK)
    del fake_hub.repositories[MODEL]
    job_id = hub_machine.queue(wanted)

    job = hub_machine.wait_for_end(job_id)

    assert job.status == JobStatus.FAILED
    assert job.error["code"] in {"model_not_found", "revision_not_found"}
    assert len(hub_machine.attempts(job_id)) == 1
