"""The processes of the one-machine form: started, restarted after a crash, stopped together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ProcessGroup", "Program", "Restart"]

BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
STEADY_S = 60.0
"""A program that ran this long starts again with the first pause of the back-off."""
POLL_S = 0.1
LOG_TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One process to keep running."""

    name: str
    module: str
    """Run as `python -m <module>`."""
    stop_s: float
    """How long it may take to end after SIGTERM."""
    environment: Mapping[str, str] = field(repr=False)
    """Holds secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """A program that ended and will be started again."""

    program: Program
    exit_code: int
    pause_s: float
    log_tail: str


class ProcessGroup:
    """Keeps programs running, each in a session of its own and with a log file of its own.

    Their own sessions keep a Ctrl-C of the terminal away from them: it reaches this process, which
    then stops them in order.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        log_dir: Path,
        on_restart: Callable[[Restart], None],
    ) -> None:
        self._kept = [_Kept(program, log_dir) for program in programs]
        self._on_restart = on_restart

    def start(self) -> None:
        """Start all."""
        for kept in self._kept:
            kept.start()

    def tend(self) -> None:
        """Start again what ended and has waited long enough; call it a few times a second."""
        for kept in self._kept:
            restart = kept.tend()
            if restart is not None:
                self._on_restart(restart)

    def is_failing(self, tries: int) -> bool:
        """True when a program ended `tries` times in a row without ever running steadily."""
        return any(kept.failures >= tries for kept in self._kept)

    def stop(self, is_impatient: Callable[[], bool]) -> None:
        """End all, the last started first; `is_impatient` turning true ends them at once."""
        for kept in reversed(self._kept):
            kept.ask_to_stop()
        for kept in reversed(self._kept):
            kept.wait_for_stop(is_impatient)


class _Kept:
    def __init__(self, program: Program, log_dir: Path) -> None:
        self.program = program
        self.failures = 0
        self._log = log_dir / f"{program.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()
        self._started_at = 0.0
        self._start_at: float | None = None

    def start(self) -> None:
        self._close_stdin()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "api.cli.attended", self.program.module],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.program.environment),
                start_new_session=True,
            )
        self._groups.add(self._process.pid)
        self._started_at = time.monotonic()
        self._start_at = None

    def tend(self) -> Restart | None:
        now = time.monotonic()
        if self._start_at is not None:
            if now >= self._start_at:
                self.start()
            return None
        exit_code = None if self._process is None else self._process.poll()
        if exit_code is None:
            return None
        self.failures = 1 if now - self._started_at >= STEADY_S else self.failures + 1
        pause_s = BACK_OFF_S[min(self.failures, len(BACK_OFF_S)) - 1]
        self._start_at = now + pause_s
        return Restart(
            program=self.program, exit_code=exit_code, pause_s=pause_s, log_tail=self._log_tail()
        )

    def ask_to_stop(self) -> None:
        self._start_at = None
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait_for_stop(self, is_impatient: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.program.stop_s
        while self._has_members() and time.monotonic() < deadline and not is_impatient():
            time.sleep(POLL_S)
        for group in self._groups:
            _signal_group(group, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._close_stdin()

    def _close_stdin(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _has_members(self) -> bool:
        # reaps the leader first: as a zombie it would count as a member
        if self._process is not None:
            self._process.poll()
        self._groups = {group for group in self._groups if _signal_group(group, 0)}
        return bool(self._groups)

    def _log_tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
