"""The command answers at once: what is slow to import is not imported for help."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from api.cli.main import COMMANDS, app

SLOW = ("httpx", "sqlalchemy", "celery", "pydantic", "fastapi", "torch", "transformers")
REPORT = (
    "import sys, json, api.cli.main as m\n"
    "try:\n    m.app({arguments!r})\nexcept SystemExit: pass\n"
    "print('\\n' + json.dumps(sorted(sys.modules)))"
)


def loaded_by(*arguments):
    code = REPORT.format(arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_loads_nothing_slow():
    assert loaded_by("--help").isdisjoint(SLOW)


def test_a_client_command_loads_no_server():
    loaded = loaded_by("jobs", "--help")

    assert "httpx" in loaded
    assert loaded.isdisjoint({"sqlalchemy", "celery", "fastapi", "torch"})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help_page(name):
    answer = CliRunner().invoke(app, [name, "--help"])

    assert answer.exit_code == 0, answer.output
    assert "Usage" in answer.output


def test_an_unknown_command_is_refused():
    assert CliRunner().invoke(app, ["bogus"]).exit_code == 2
