import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from api.cli.processes import ProcessGroup, Program

ROOT = Path(__file__).parents[3]
WAIT_S = 10.0

STEADY = "import os, time; open('steady.pid', 'a').write(f'{os.getpid()}\\n'); time.sleep(60)"
CRASHING = "print('no such table'); raise SystemExit(3)"
DEAF = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "open('deaf.pid', 'a').write(f'{os.getpid()}\\n'); time.sleep(60)"
)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Modules that stand for the service's processes; each notes its pid in a file."""
    for name, text in {"steady": STEADY, "crashing": CRASHING, "deaf": DEAF}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return lambda name, stop_s=5.0: Program(
        name=name, module=name, stop_s=stop_s, environment={"PYTHONPATH": path}
    )


@pytest.fixture
def start_group(tmp_path):
    groups = []

    def start(*programs):
        restarts = []
        group = ProcessGroup(programs, log_dir=tmp_path / "logs", on_restart=restarts.append)
        groups.append(group)
        group.start()
        return group, restarts

    yield start
    for group in groups:
        group.stop(lambda: True)


def pids(name, count=1):
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        path = Path(f"{name}.pid")
        found = path.read_text().splitlines() if path.exists() else []
        if len(found) >= count:
            return [int(pid) for pid in found]
        time.sleep(0.02)
    pytest.fail(f"{name} did not start {count} times")


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(is_true):
    end = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_stopping_leaves_no_process(programs, start_group):
    group, _ = start_group(programs("steady"))
    (pid,) = pids("steady")

    group.stop(lambda: False)

    assert not is_running(pid)


def test_a_process_that_does_not_listen_is_killed_when_its_time_is_over(programs, start_group):
    group, _ = start_group(programs("deaf", stop_s=0.5))
    (pid,) = pids("deaf")

    started = time.monotonic()
    group.stop(lambda: False)

    assert 0.4 < time.monotonic() - started < 30
    assert not is_running(pid)


def test_an_impatient_stop_waits_for_nobody(programs, start_group):
    group, _ = start_group(programs("deaf", stop_s=60))
    (pid,) = pids("deaf")

    group.stop(lambda: True)

    assert not is_running(pid)


def test_a_killed_process_starts_again_after_a_pause(programs, start_group):
    group, restarts = start_group(programs("steady"))
    (pid,) = pids("steady")

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: group.tend() or restarts)
    wait_until(lambda: group.tend() or len(pids("steady")) == 2)

    assert restarts[0].exit_code == -signal.SIGKILL
    assert restarts[0].pause_s == 1.0
    assert is_running(pids("steady")[1])


def test_a_crash_is_told_with_the_end_of_the_log(programs, start_group):
    group, restarts = start_group(programs("crashing"))

    wait_until(lambda: group.tend() or restarts)

    assert restarts[0].exit_code == 3
    assert "no such table" in restarts[0].log_tail


def test_a_process_that_never_stays_up_is_noticed(programs, start_group):
    group, restarts = start_group(programs("crashing"))

    wait_until(lambda: group.tend() or len(restarts) == 2)

    assert [restart.pause_s for restart in restarts] == [1.0, 2.0]
    assert group.is_failing(2)
    assert not group.is_failing(3)


def test_the_processes_end_with_whoever_started_them(programs, tmp_path):
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
    )
    (pid,) = pids("steady")

    starter.kill()
    starter.wait()

    wait_until(lambda: not is_running(pid))


STARTER = """
import os, time
from pathlib import Path
from api.cli.processes import ProcessGroup, Program
program = Program(name="steady", module="steady", stop_s=5.0, environment=dict(os.environ))
ProcessGroup([program], log_dir=Path("logs"), on_restart=print).start()
time.sleep(60)
"""
