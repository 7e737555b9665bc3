"""`python -m api` as a process of its own."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from api.cli.environment import settings_environment
from api.db.base import new_id
from api.db.connection import Database, database_now
from api.db.repositories.access import get_or_create_tenant
from api.db.tables.artifacts import Deployment
from api.services.jobs import NewJob, create_job
from api.settings import DatabaseSettings, InferenceSettings, ServerSettings, Settings
from tests.fake_inference import END, FINISH, START, run_fake_inference, token
from tests.integration.machine import ROOT
from tests.running_api import RunningApi
from tests.servers import free_port


@pytest.fixture
def start(tmp_path):
    """Start the process; keywords replace settings."""
    started = []

    def run(**groups):
        server = ServerSettings(port=free_port())
        inference = InferenceSettings(url=f"http://127.0.0.1:{free_port()}")
        groups = {"inference": inference} | groups
        settings = Settings(data_dir=tmp_path, server=server, **groups)
        process = subprocess.Popen(
            [sys.executable, "-m", "api"],
            cwd=ROOT,
            env=settings_environment(settings, os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, f"http://127.0.0.1:{server.port}"

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_it_starts_with_nothing_shows_its_first_key_once_and_stops_with_open_streams(
    start, tmp_path
):
    process, url = start()
    shown = process.stdout.readline()
    key = shown.split()[-1]
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
        wait_until_ready(client)
        job = queue_job(tmp_path)
        with client.stream("GET", f"/v1/quantizations/{job.id}/events") as stream:
            # an iterator that nobody holds ends the connection
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            output, log = process.communicate(timeout=40)

    assert "First API key" in shown
    assert process.returncode in {0, -signal.SIGTERM}
    assert key not in output + log
    again, url = start()
    with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
        wait_until_ready(client)
        assert client.get("/v1/api_keys").status_code == 200
    again.send_signal(signal.SIGTERM)
    assert "First API key" not in again.communicate(timeout=40)[0]


def test_a_stopping_process_finishes_answers_and_takes_no_more(start, tmp_path):
    with run_fake_inference() as fake:
        process, url = start(inference=InferenceSettings(url=fake.url))
        headers = {"Authorization": f"Bearer {process.stdout.readline().split()[-1]}"}
        fake.records = [START, *[token("x")] * 10, FINISH, END]
        fake.pause_s = 0.1
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as client:
            wait_until_ready(client)
            host(tmp_path)
            wanted = {"model": "hosted", "prompt": "a", "stream": True}
            with client.stream("POST", "/v1/completions", json=wanted) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                ready = client.get("/readyz")
                refused = client.post("/v1/completions", json=wanted)
                *_, last = [line for line in lines if line]
        process.communicate(timeout=20)

    assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) > 0
    assert last == "data: [DONE]"
    assert process.returncode == 0


def test_a_database_without_tables_is_said_in_one_sentence(start, tmp_path):
    url = f"sqlite:///{tmp_path / 'empty.db'}"

    process, _ = start(database=DatabaseSettings(url=url))
    _, log = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "abq migrate" in log
    assert "Traceback" not in log


def host(data_dir):
    """Host an artifact under the name `hosted`, straight into the database."""
    settings = Settings(data_dir=data_dir)
    database = Database(settings.database_url)
    api = RunningApi(url="", settings=settings, database=database)
    _, artifact_id = api.artifact()
    with database.write() as session:
        session.add(
            Deployment(
                id=new_id("dep"),
                tenant_id=api.tenant(),
                artifact_id=artifact_id,
                name="hosted",
                created_at=database_now(session),
            )
        )
    database.close()


def queue_job(data_dir):
    settings = Settings(data_dir=data_dir)
    database = Database(settings.database_url)
    with database.write() as session:
        tenant = get_or_create_tenant(session, "default")
    wanted = NewJob(
        model="acme/tiny", revision=None, source_sha="f" * 40, spec={"w_bits": 4}, evaluation={}
    )
    try:
        return create_job(database, settings, tenant.id, wanted)
    finally:
        database.close()


def wait_until_ready(client):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the API did not start")
