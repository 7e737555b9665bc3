"""The README's walk-through, run as it is written: only model, address and command are others."""

import os
import re
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

from tests.integration.machine import ROOT, wait_until
from tests.servers import free_port
from tests.tiny_llama import save_tiny_llama

ABQ = f"{sys.executable} -m api.cli"
WALK_S = 240


def shell_blocks():
    """The shell blocks of the walk-through, in order; the first one starts the service."""
    section = (ROOT / "README.md").read_text().split("## The four uses, by hand")[1]
    return re.findall(r"```sh\n(.*?)```", section.split("\n## ")[0], re.DOTALL)


@pytest.fixture
def home(tmp_path):
    save_tiny_llama(tmp_path / ".demo" / "models" / "tiny", positions=4096)
    return tmp_path


@pytest.fixture
def environment(home):
    own = {name: value for name, value in os.environ.items() if not name.startswith("ABQ_")}
    return own | {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "ABQ_SERVER__PORT": str(free_port()),
        "ABQ_INFERENCE__URL": f"http://127.0.0.1:{free_port()}",
    }


@pytest.fixture
def url(home, environment):
    """The address of a service that the README's first command has started."""
    command = shell_blocks()[0].strip().replace(".venv/bin/abq", ABQ).split()
    with (home / "up.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{environment['ABQ_SERVER__PORT']}"
    try:
        wait_until(lambda: answers(f"{address}/readyz"), (home / "up.log").read_text)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url):
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the walk-through is curl's")
def test_the_walk_through_of_the_readme_works_as_written(url, home, environment):
    script = "set -euo pipefail\n" + "\n".join(shell_blocks()[1:])
    for written, here in {
        ".venv/bin/abq": ABQ,
        "http://127.0.0.1:8000": url,
        "SmolLM2-135M-Instruct": "tiny",
    }.items():
        assert written in script
        script = script.replace(written, here)

    done = subprocess.run(
        ["bash", "-c", script],
        cwd=home,
        env={**environment, "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WALK_S,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "event: done" in done.stdout
    assert "model/abq_manifest.json: OK" in done.stdout
    assert "FAILED" not in done.stdout
    assert "data: [DONE]" in done.stdout
    assert "every sha256 is that of the manifest" in done.stdout
    assert any((home / "model").glob("*.safetensors"))
