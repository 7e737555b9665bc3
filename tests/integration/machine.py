"""The service as processes of this machine, for tests that kill some of them."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy import make_url, select

from api.cli.environment import settings_environment
from api.db.repositories.access import get_or_create_tenant
from api.db.tables.artifacts import Artifact
from api.db.tables.jobs import TERMINAL, Job, JobAttempt, JobEvent, JobStatus
from api.hub.routing import create_hub
from api.services.jobs import NewJob, create_job
from engine.spec import QuantSpec

ROOT = Path(__file__).parents[2]
SPEC = {
    "w_bits": 4,
    "a_bits": 8,
    "calibration": {"samples": 8, "length": 64, "epochs": 2},
}
"""About half a second for each decoder layer of the tiny model."""
QUICK = {
    "w_bits": 4,
    "recipe": "rtn",
    "calibration": {"samples": 1, "length": 16, "epochs": 0},
}
"""Nothing is trained."""
EVALUATION = {"enabled": True, "windows": 1, "length": 64}
WAIT_S = 60.0
TOKEN = "hf_" + "s3cretT0kenThatNobodyMaySee" * 2


class Machine:
    """Jobs, and the processes that run them."""

    def __init__(self, settings, database, folder):
        self.settings = settings
        self.database = database
        self._folder = folder
        self._processes = []
        with database.write() as session:
            self.tenant_id = get_or_create_tenant(session, "default").id

    def start(self, module):
        """Start `python -m <module>` in a session of its own."""
        environment = settings_environment(self.settings, os.environ)
        with (self._folder / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                env={
                    **environment,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "HF_TOKEN": TOKEN,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def kill(self, process):
        """End a process and its pool as a power cut does; what it started must end by itself."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def freeze(self, process):
        """Stop a process and its pool in their tracks, but not inside a transaction."""
        path = make_url(self.settings.database_url).database
        while True:
            os.killpg(process.pid, signal.SIGSTOP)
            # a frozen holder of SQLite's only lock would freeze everyone else as well
            with closing(sqlite3.connect(path, timeout=0.2, isolation_level=None)) as connection:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    os.killpg(process.pid, signal.SIGCONT)
                    time.sleep(0.05)
                else:
                    connection.execute("ROLLBACK")
                    return

    def stop(self):
        """End everything that was started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        wait_until(lambda: not self.children(), "a calibration process outlived its worker")

    def create_job(self, **fields):
        """Queue a quantization as the API does after its checks; return its id."""
        return self.queue(self.new_job(**fields))

    def new_job(self, model="local:models/tiny", spec=SPEC, publish=None):
        """What the API makes of a request that passed its checks."""
        return NewJob(
            model=model,
            revision=None,
            source_sha=create_hub(self.settings).resolve(model, None).sha,
            spec=QuantSpec.from_json(spec).to_json(),
            evaluation=EVALUATION,
            publish=publish,
        )

    def queue(self, wanted):
        """Queue a quantization and return its id."""
        return create_job(self.database, self.settings, self.tenant_id, wanted).id

    def job(self, job_id):
        """The job as it is now."""
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def events(self, job_id, kind=None):
        """The job's events so far, of all kinds or of one."""
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id)
        with self.database.read() as session:
            events = session.scalars(query).all()
        return [event for event in events if kind is None or event.type == kind]

    def attempts(self, job_id):
        """How each attempt ended."""
        query = select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.attempt)
        with self.database.read() as session:
            return [attempt.outcome for attempt in session.scalars(query)]

    def resumed_layers(self, job_id):
        """Layers that an attempt took from the checkpoints of another."""
        finished = self.events(job_id, "layer.finished")
        return [event.data["index"] for event in finished if event.data["resumed"]]

    def artifact(self, job):
        """The artifact of a job that has succeeded."""
        assert job.status == JobStatus.SUCCEEDED, job.error
        with self.database.read() as session:
            return session.get_one(Artifact, job.artifact_id)

    def artifact_folders(self):
        """What the store holds, by id."""
        return sorted(path.name for path in self.settings.storage_root.glob("art_*"))

    def wait_for_layer(self, job_id, index=1):
        """Wait until a layer is on disk and others are still to come."""
        wait_until(
            lambda: any(
                event.data["index"] >= index for event in self.events(job_id, "checkpoint.saved")
            ),
            lambda: f"layer {index} was not reached; {self.log()}",
        )

    def wait_for_end(self, job_id):
        """Wait until the job is at an end and return it."""
        wait_until(
            lambda: self.job(job_id).status in TERMINAL,
            lambda: f"the job is {self.job(job_id).status}; {self.log()}",
        )
        return self.job(job_id)

    def children(self, job_id=""):
        """Process ids of the calibrations of one job, or of all."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            # it may end between any two looks; a zombie has no command
            with suppress(OSError):
                command = (folder / "cmdline").read_bytes().decode().split("\0")
                if "worker.child" in command and str(self._folder) in command[-2]:
                    found += [int(folder.name)] if job_id in command[-2] else []
        return found

    def wait_for_child(self, job_id):
        """Wait for a calibration process of a job and return its id."""
        wait_until(lambda: self.children(job_id), lambda: f"no calibration started; {self.log()}")
        return self.children(job_id)[0]

    def log(self):
        """The end of all logs."""
        logs = [*self._folder.glob("*.log"), *self.settings.work_dir.glob("*/*/child.log")]
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in logs)


def wait_until(is_true, message, timeout_s=WAIT_S):
    """Poll until something holds."""
    end = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > end:
            raise AssertionError(message() if callable(message) else message)
        time.sleep(0.05)
