import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from worker.child_process import ChildProcess, scrub_environment
from worker.failure import failure_of_child

WAIT_S = 10.0


@pytest.fixture
def run_program(tmp_path):
    """Run a Python program in the place of the calibration child."""
    children = []

    def run(program):
        log = tmp_path / "child.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                process_group=0,
            )
        children.append(ChildProcess(process, log))
        return children[-1]

    yield run
    for child in children:
        child.close()


def follow(child):
    events = []
    end = time.monotonic() + WAIT_S
    while not child.is_done:
        assert time.monotonic() < end
        events += child.take(0.05)
    return events


def test_events_arrive_in_order_and_the_report_apart(run_program):
    child = run_program(
        'print(\'{"type": "log", "message": "a"}\');'
        'print(\'{"type": "log", "message": "b"}\');'
        'print(\'{"type": "result", "report": {"layers": 2}}\')'
    )

    events = follow(child)

    assert [event["message"] for event in events] == ["a", "b"]
    assert child.final == {"type": "result", "report": {"layers": 2}}
    assert failure_of_child(child) is None


def test_what_a_library_prints_is_no_event(run_program):
    child = run_program("print('loading...'); print('[1]'); print('{\"type\": 3}')")

    assert follow(child) == []


def test_a_half_written_line_does_not_block(run_program):
    child = run_program(
        "import sys, time; sys.stdout.write('{\"type\":'); sys.stdout.flush(); time.sleep(60)"
    )

    started = time.monotonic()
    assert child.take(0.1) == []

    assert time.monotonic() - started < 30


def test_a_killed_child_ran_out_of_memory_as_far_as_anyone_can_tell(run_program):
    child = run_program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    follow(child)

    failure = failure_of_child(child)

    assert failure.code == "out_of_memory"
    assert failure.is_transient


def test_a_crash_is_told_with_the_last_line_of_its_log(run_program):
    child = run_program(
        "raise RuntimeError('no such layer hf_abcdefghijklmnopqrstuvwxyz0123456789')"
    )
    follow(child)

    failure = failure_of_child(child)

    assert failure.code == "calibration_crashed"
    assert "exit code 1: RuntimeError: no such layer" in failure.to_json()["message"]
    assert "hf_abcdef" not in failure.to_json()["message"]


def test_an_error_record_names_the_layer_and_is_not_tried_again(run_program):
    child = run_program(
        'print(\'{"type": "error", "code": "calibration_diverged",'
        ' "message": "loss is nan", "layer": "model.layers.3"}\'); raise SystemExit(1)'
    )
    follow(child)

    failure = failure_of_child(child)

    assert failure.layer == "model.layers.3"
    assert not failure.is_transient


def test_a_report_followed_by_a_crash_is_no_success(run_program):
    child = run_program('print(\'{"type": "result", "report": {}}\'); raise SystemExit(3)')
    follow(child)

    assert failure_of_child(child).code == "calibration_crashed"


def test_killing_a_child_kills_what_it_started(run_program):
    child = run_program(
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        'print(\'{"type": "log", "pid": %d}\' % p.pid, flush=True)\n'
        "p.wait()"
    )
    (event,) = wait_for_events(child)

    child.kill()
    follow(child)

    assert wait_until_gone(event["pid"])


def test_a_grandchild_that_keeps_the_pipe_does_not_keep_the_job(run_program):
    child = run_program(
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        'print(\'{"type": "log", "pid": %d}\' % p.pid, flush=True)'
    )

    (event,) = follow(child)

    assert wait_until_gone(event["pid"])


def test_no_secret_and_no_setting_reaches_the_child():
    worker = {
        "PATH": "/bin",
        "HF_TOKEN": "hf_secret",
        "HUGGING_FACE_HUB_TOKEN": "hf_secret",
        "ABQ_HUB__TOKEN": "hf_secret",
        "AWS_SECRET_ACCESS_KEY": "x",
        "OMP_NUM_THREADS": "2",
    }

    passed = scrub_environment(worker, gpu_uuid="GPU-1")

    assert passed == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "CUDA_VISIBLE_DEVICES": "GPU-1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def wait_for_events(child):
    end = time.monotonic() + WAIT_S
    while not (events := child.take(0.05)):
        assert time.monotonic() < end
    return events


def wait_until_gone(pid):
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # an orphan whose new parent does not reap it is gone as well
        with suppress(FileNotFoundError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.02)
    return False
