"""The calibration process: started without secrets, read line by line, stopped with its group."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from api.telemetry import get_logger

__all__ = ["ChildProcess", "scrub_environment"]

log = get_logger(__name__)

FINAL_TYPES = frozenset({"result", "error"})
MAX_LINE_BYTES = 1 << 20
PIPE_LINGER_S = 2.0
"""How long a dead child's pipe is still read; a stray grandchild may hold it open."""
LOG_TAIL_BYTES = 4096
# named one by one, so that a secret added to the worker tomorrow stays out as well
PASSED_NAMES = frozenset({
    "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "HOME", "LANG", "LD_LIBRARY_PATH", "PATH",
    "PYTHONHASHSEED", "PYTHONPATH", "SYSTEMROOT", "TMPDIR", "TZ", "VIRTUAL_ENV",
})  # fmt: skip
PASSED_PREFIXES = ("LC_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "OPENBLAS_", "TORCH", "TRITON_")
# the child reads local folders only, and no token that a login left in the home folder
OFFLINE = {
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


# threads that spin while they wait cost several times the work on a machine that does other things
# too; and without a fixed workspace the matrix products of a GPU do not repeat
REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_WAIT_POLICY": "passive"}


class ChildProcess:
    """One running `python -m worker.child`; its events arrive through `take`."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self._process = process
        self._log_path = log_path
        self._records: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._died_at: float | None = None
        self.final: dict[str, Any] | None = None
        """The `result` or `error` record, once it came."""
        self._reader = threading.Thread(target=self._read_records, name="child-reader", daemon=True)
        self._reader.start()

    @classmethod
    def start(cls, job_file: Path, *, environment: Mapping[str, str], log_path: Path) -> Self:
        """Start the child on a job description; its standard error goes to `log_path`."""
        with log_path.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.child", str(job_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                process_group=0,
            )
        log.info("child_started", pid=process.pid)
        return cls(process, log_path)

    def take(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call; waits at most `timeout_s` for the first."""
        taken: list[dict[str, Any]] = []
        try:
            taken.append(self._records.get(timeout=timeout_s))
            while True:
                taken.append(self._records.get_nowait())
        except queue.Empty:
            return taken

    @property
    def is_done(self) -> bool:
        """True when the process is gone and all it wrote was taken."""
        if self._process.poll() is None:
            return False
        if self._died_at is None:
            self._died_at = time.monotonic()
            self._signal_group(signal.SIGKILL)
        is_read = not self._reader.is_alive() or time.monotonic() > self._died_at + PIPE_LINGER_S
        return is_read and self._records.empty()

    @property
    def exit_code(self) -> int | None:
        """As `subprocess` tells it: negative for a signal, None while running."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Let it finish its step and leave."""
        self._process.terminate()

    def kill(self) -> None:
        """End it and everything it started, at once."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it if it still runs and give back its pipes."""
        if self._process.poll() is None:
            self.kill()
        self._reader.join(timeout=PIPE_LINGER_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not (pipe is self._process.stdout and self._reader.is_alive()):
                pipe.close()

    def log_tail(self) -> str:
        """The last lines that it wrote to standard error."""
        with self._log_path.open("rb") as lines:
            lines.seek(max(0, self._log_path.stat().st_size - LOG_TAIL_BYTES))
            return lines.read().decode(errors="replace").strip()

    def _read_records(self) -> None:
        stdout: IO[bytes] | None = self._process.stdout
        assert stdout is not None  # noqa: S101 - started with a pipe
        while line := stdout.readline(MAX_LINE_BYTES):
            record = _parse_record(line)
            if record is None:
                log.warning("child_wrote_no_event", line=line[:200].decode(errors="replace"))
            elif record["type"] in FINAL_TYPES:
                self.final = record
            else:
                self._records.put(record)

    def _signal_group(self, number: signal.Signals) -> None:
        # the group has the child's pid; it may be gone, members and all
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def scrub_environment(environment: Mapping[str, str], gpu_uuid: str | None) -> dict[str, str]:
    """What a child may see of the worker's environment: no settings, no tokens, no network.

    Args:
        environment: the worker's own.
        gpu_uuid: the one GPU that the child may use; None leaves the worker's choice.
    """
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_NAMES or name.startswith(PASSED_PREFIXES)
    }
    gpu = {} if gpu_uuid is None else {"CUDA_VISIBLE_DEVICES": gpu_uuid}
    return {**REPEATABLE, **passed, **OFFLINE, **gpu}


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("type"), str) else None
