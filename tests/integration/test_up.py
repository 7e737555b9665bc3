"""`abq up` as a person uses it: one command, one Ctrl-C, whatever dies in between."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.integration.machine import ROOT, wait_until
from tests.servers import free_port


class Service:
    """A running `abq up` and what it started."""

    def __init__(self, folder):
        self.data_dir = folder / "data"
        self._output = folder / "output.txt"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ABQ_")},
            "ABQ_DATA_DIR": str(self.data_dir),
            "ABQ_SERVER__PORT": str(free_port()),
            "ABQ_INFERENCE__URL": f"http://127.0.0.1:{free_port()}",
            "OMP_NUM_THREADS": "1",
        }
        self.process = self.start()

    def start(self):
        with self._output.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "api.cli", "up"],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self):
        return self._output.read_text()

    def wait_until_up(self):
        wait_until(lambda: "ABQ is up" in self.output(), self.output)

    def client(self):
        config = json.loads((self.data_dir / "client.json").read_text())
        headers = {"Authorization": f"Bearer {config['api_key']}"}
        return httpx.Client(base_url=config["url"], headers=headers, timeout=30)

    def processes(self, module=""):
        """Leaders and pools of the service's processes, by what they run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (folder / "cmdline").read_bytes().decode().split("\0")
                environment = (folder / "environ").read_bytes().decode()
                is_ours = f"ABQ_DATA_DIR={self.data_dir}\0" in environment
                if is_ours and "api.cli.attended" in command and module in ("", command[3]):
                    found.append(int(folder.name))
        return found


@pytest.fixture
def service(tmp_path):
    started = Service(tmp_path)
    yield started
    for pid in (started.process.pid, *started.processes()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.process.wait()


def test_one_command_starts_the_service_and_one_interrupt_ends_all_of_it(service):
    service.wait_until_up()
    with service.client() as client:
        listed = client.get("/v1/quantizations")
    second = service.start()

    assert listed.json()["data"] == []
    assert second.wait(30) == 1
    assert "already runs in" in service.output()
    assert (service.data_dir.stat().st_mode & 0o077) == 0
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(30) == 0
    assert service.processes() == []


def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        refused = subprocess.run(
            [sys.executable, "-m", "api.cli", "up", "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, "ABQ_DATA_DIR": str(tmp_path / "data")},
            capture_output=True,
            text=True,
            check=False,
        )

    assert refused.returncode == 1
    assert f"127.0.0.1:{port}" in refused.stderr
    assert "ABQ_SERVER__PORT" in refused.stderr


def test_a_killed_process_comes_back(service):
    service.wait_until_up()
    (before,) = service.processes("api")

    os.kill(before, signal.SIGKILL)
    wait_until(lambda: service.processes("api") not in ([], [before]), service.output)

    def is_ready():
        with service.client() as client, suppress(httpx.TransportError):
            return client.get("/readyz").status_code == 200

    wait_until(is_ready, service.output)
    assert "api ended with code -9" in service.output()


def test_nothing_outlives_a_killed_command(service):
    service.wait_until_up()
    assert len(service.processes()) >= 4

    service.process.kill()

    wait_until(lambda: service.processes() == [], "a process outlived abq up", 30)
