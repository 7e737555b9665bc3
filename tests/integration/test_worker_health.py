"""The health check of the worker's container, against a worker and its broker."""

import os
import subprocess
import sys

import pytest

from api.cli.environment import settings_environment
from tests.integration.machine import ROOT, wait_until


def check(machine):
    environment = settings_environment(machine.settings, os.environ)
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "worker_health.py"],
        env={**environment, "PYTHONPATH": str(ROOT)},
        timeout=30,
        check=False,
    )
    return done.returncode


# containers have a Redis
@pytest.mark.parametrize("form", ["servers"], indirect=True)
def test_a_worker_is_healthy_as_long_as_it_answers(machine):
    before = check(machine)

    worker = machine.start("worker")
    wait_until(lambda: check(machine) == 0, "the worker never answered")
    machine.kill(worker)

    assert before == 1
    assert check(machine) == 1
