"""The service as the demo runs it: one machine, its own folder, free ports, stopped at the end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from api.cli.client import ApiClient
from api.cli.config import CLIENT_FILE, read_client_config
from api.cli.errors import CliError

__all__ = ["log_tail", "running_service"]

LOG_FILE = "service.log"
START_S = 120.0
STOP_S = 60.0
TAIL_LINES = 8
TAIL_CHARACTERS = 400


@contextmanager
def running_service(home: Path, model_roots: dict[str, Path]) -> Iterator[ApiClient]:
    """Start `abq up` in a folder of its own and yield a client of it; stop it in any case.

    Raises:
        CliError: if it does not answer within `START_S`.
    """
    data_dir = home / "data"
    # what an interrupted demo left would go on beside this one
    shutil.rmtree(data_dir, ignore_errors=True)
    data_dir.mkdir(parents=True)
    api_port, inference_port = _free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ABQ_")},
        "ABQ_DATA_DIR": str(data_dir),
        "ABQ_SERVER__PORT": str(api_port),
        "ABQ_INFERENCE__URL": f"http://127.0.0.1:{inference_port}",
        "ABQ_HUB__MODEL_ROOTS": json.dumps({name: str(path) for name, path in model_roots.items()}),
    }
    with (home / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "up"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with _wait_until_ready(process, data_dir) as client:
            yield client
    finally:
        _stop(process)


def log_tail(home: Path) -> str:
    """The last lines that the service and each of its processes wrote."""
    paths = [home / LOG_FILE, *sorted((home / "data" / "logs").glob("*.log"))]
    return "\n".join(f"{path}:\n{_tail(path)}" for path in paths if path.is_file())


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    # the end of a long line is the error, its beginning the way there
    return "\n".join(f"  {line[-TAIL_CHARACTERS:]}" for line in lines)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_ready(process: "subprocess.Popen[bytes]", data_dir: Path) -> ApiClient:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CliError(f"the service ended at its start with exit code {process.returncode}")
        if (data_dir / CLIENT_FILE).is_file():
            config = read_client_config(data_dir)
            client = ApiClient(config.url, config.api_key)
            if _is_ready(client):
                return client
        time.sleep(0.2)
    raise CliError(f"the service was not ready within {START_S:.0f} s")


def _is_ready(client: ApiClient) -> bool:
    try:
        client.get("/readyz")
    except CliError:
        return False
    return True


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
