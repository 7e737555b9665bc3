import json
import sys
from dataclasses import dataclass

import pytest

from api.cli.main import main
from api.settings import HubSettings, InferenceSettings, LimitSettings
from tests.running_api import run_api
from tests.servers import free_port
from tests.tiny_llama import save_tiny_llama


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def database_url(sqlite_url):
    # the client sees no difference between databases
    return sqlite_url


@pytest.fixture(scope="session")
def cli_model_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_tiny_llama(root / "tiny")
    return root


@pytest.fixture
def api(settings, database, cli_model_root):
    """A server that knows `local:models/tiny`, without an inference service."""
    own = {
        "inference": InferenceSettings(url=f"http://127.0.0.1:{free_port()}"),
        "limits": LimitSettings(active_jobs=200),
        "hub": HubSettings(model_roots={"models": cli_model_root}),
    }
    with run_api(settings.model_copy(update=own), database) as running:
        yield running


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `abq` in this process."""

    def command(*arguments, columns=200):
        monkeypatch.setattr(sys, "argv", ["abq", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return command


@pytest.fixture
def abq(api, run):
    """Run `abq` with an admin's key against the running API."""
    key = api.key()
    return lambda *arguments, **options: run("--url", api.url, "--key", key, *arguments, **options)
