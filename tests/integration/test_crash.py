"""What dies while a job runs, and what becomes of the job."""

import json
import os
import signal
import subprocess
import sys

import pytest

from api.db.tables.jobs import JobStatus
from api.hub.routing import create_hub
from api.settings import HubSettings, Settings
from engine.spec import QuantSpec
from tests.integration.machine import EVALUATION, QUICK, ROOT, SPEC, wait_until

only_files = pytest.mark.parametrize("form", ["files"], indirect=True)


@pytest.fixture(scope="session")
def undisturbed_sha256(models, tmp_path_factory):
    """The digest of the tiny model's artifact when nothing happens: one child, one run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    hub = create_hub(Settings(hub=HubSettings(model_roots={"models": models})))
    sha = hub.resolve("local:models/tiny", None).sha
    job = {
        "source_dir": str(models / "tiny"),
        "out_dir": str(folder / "out"),
        "state_dir": str(folder / "state"),
        "spec": QuantSpec.from_json(SPEC).to_json(),
        "source": {"repo": "local:models/tiny", "revision": sha},
        "calibration_text": None,
        "evaluation": EVALUATION,
        "evaluation_text": None,
        "threads": 1,
        "device": "cpu",
    }
    (folder / "job.json").write_text(json.dumps(job))
    # the child ends when this pipe does
    read_end, write_end = os.pipe()
    child = subprocess.run(
        [sys.executable, "-m", "worker.child", str(folder / "job.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=read_end,
        stdout=subprocess.PIPE,
        check=True,
    )
    os.close(read_end)
    os.close(write_end)
    return json.loads(child.stdout.splitlines()[-1])["report"]["manifest_sha256"]


# over files, the tests below lose a worker, and resume to the same bytes
@pytest.mark.parametrize("form", ["servers"], indirect=True)
def test_a_killed_worker_leaves_no_orphan_and_the_job_resumes_to_the_same_bytes(
    machine, dispatcher, undisturbed_sha256
):
    worker = machine.start("worker")
    job_id = machine.create_job()
    machine.wait_for_layer(job_id, 1)

    machine.kill(worker)
    wait_until(lambda: not machine.children(), "the calibration outlived its worker", 5)
    machine.start("worker")
    job = machine.wait_for_end(job_id)

    assert job.status == JobStatus.SUCCEEDED
    assert machine.attempts(job_id) == ["worker_lost", "succeeded"]
    assert machine.resumed_layers(job_id)[:2] == [0, 1]
    assert len(machine.resumed_layers(job_id)) < 6
    assert machine.artifact(job).manifest_sha256 == undisturbed_sha256
    folder = machine.settings.work_dir / job_id
    wait_until(lambda: not folder.exists(), "the work of a finished job was kept", 5)


@only_files
def test_nothing_outlives_the_main_process_of_a_worker(machine, dispatcher):
    worker = machine.start("worker")
    job_id = machine.create_job()
    machine.wait_for_layer(job_id, 0)

    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()

    wait_until(lambda: not machine.children(), "the calibration outlived its worker", 5)
    wait_until(lambda: machine.attempts(job_id) == ["worker_lost"], "the lease did not end", 10)
    assert machine.job(job_id).status == JobStatus.QUEUED


@only_files
def test_a_calibration_killed_each_time_ran_out_of_memory_and_the_next_job_runs(
    machine, dispatcher
):
    machine.start("worker")
    killed_id = machine.create_job()
    next_id = machine.create_job(spec=QUICK)

    for _ in range(3):
        os.kill(machine.wait_for_child(killed_id), signal.SIGKILL)
        wait_until(lambda: not machine.children(killed_id), "the child outlived SIGKILL", 5)
    killed, following = machine.wait_for_end(killed_id), machine.wait_for_end(next_id)

    assert killed.status == JobStatus.FAILED
    assert killed.error["code"] == "out_of_memory"
    assert machine.attempts(killed_id) == ["out_of_memory"] * 3
    assert following.status == JobStatus.SUCCEEDED


@only_files
def test_a_calibration_killed_once_goes_on_behind_its_last_layer(
    machine, dispatcher, undisturbed_sha256
):
    machine.start("worker")
    job_id = machine.create_job()
    machine.wait_for_layer(job_id, 2)

    os.kill(machine.wait_for_child(job_id), signal.SIGKILL)
    job = machine.wait_for_end(job_id)

    assert machine.attempts(job_id) == ["out_of_memory", "succeeded"]
    assert machine.resumed_layers(job_id)[:3] == [0, 1, 2]
    assert machine.artifact(job).manifest_sha256 == undisturbed_sha256


@only_files
def test_a_worker_that_comes_back_from_the_dead_changes_nothing(machine, dispatcher):
    frozen = machine.start("worker")
    job_id = machine.create_job()
    machine.wait_for_layer(job_id, 0)

    child = machine.wait_for_child(job_id)
    os.kill(child, signal.SIGSTOP)
    machine.freeze(frozen)
    wait_until(lambda: machine.attempts(job_id) == ["worker_lost"], "the lease did not end", 10)
    machine.start("worker")
    wait_until(lambda: len(machine.children(job_id)) == 2, "no second attempt began")
    os.kill(child, signal.SIGCONT)
    os.killpg(frozen.pid, signal.SIGCONT)
    wait_until(lambda: child not in machine.children(), "the lost child goes on", 10)
    job = machine.wait_for_end(job_id)

    assert job.status == JobStatus.SUCCEEDED
    assert machine.attempts(job_id) == ["worker_lost", "succeeded"]
    assert machine.artifact_folders() == [job.artifact_id]


@only_files
def test_a_job_needs_the_api_neither_to_start_nor_to_finish(machine):
    job_id = machine.create_job()
    machine.start("worker")

    # nobody has sent the wake-up yet: the API died between commit and publish
    api = machine.start("api")
    machine.wait_for_layer(job_id, 0)
    machine.kill(api)
    job = machine.wait_for_end(job_id)

    assert job.status == JobStatus.SUCCEEDED
    assert machine.attempts(job_id) == ["succeeded"]


@pytest.mark.parametrize("form", ["servers"], indirect=True)
def test_jobs_outlive_a_broker_that_forgets_everything(
    machine_settings, mortal_redis, open_machine, open_dispatcher
):
    queue = machine_settings.queue.model_copy(update={"broker_url": mortal_redis.url})
    machine = open_machine(machine_settings.model_copy(update={"queue": queue}))
    open_dispatcher(machine)
    machine.start("worker")
    running_id = machine.create_job()
    machine.wait_for_layer(running_id, 0)

    mortal_redis.kill()
    waiting_id = machine.create_job(spec=QUICK)
    mortal_redis.start()
    running, waiting = machine.wait_for_end(running_id), machine.wait_for_end(waiting_id)

    assert [running.status, waiting.status] == [JobStatus.SUCCEEDED] * 2
    assert machine.attempts(running_id) == machine.attempts(waiting_id) == ["succeeded"]
