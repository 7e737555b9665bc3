import shutil

import pytest

from api.db.connection import Database
from api.settings import HubSettings, InferenceSettings, Settings
from tests.running_api import run_api
from tests.servers import free_port
from tests.tiny_llama import save_tiny_llama


@pytest.fixture(scope="session")
def model_root(tmp_path_factory):
    """A folder of models; `local:models/tiny` is a real one."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_llama(root / "tiny", positions=1024)
    return root


@pytest.fixture
def api(settings, database):
    """A server of the test's own, over SQLite and over PostgreSQL. It has no inference service."""
    inference = InferenceSettings(url=closed_address())
    with run_api(settings.model_copy(update={"inference": inference}), database) as running:
        yield running


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory, sqlite_template, model_root):
    """One server for all tests of a module, over SQLite; it knows `local:models/tiny`.

    Neither the Hub nor the inference service answers.
    """
    folder = tmp_path_factory.mktemp("api")
    shutil.copyfile(sqlite_template, folder / "abq.db")
    settings = Settings(
        data_dir=folder,
        hub=HubSettings(endpoint=closed_address(), model_roots={"models": model_root}),
        inference=InferenceSettings(url=closed_address()),
    )
    database = Database(settings.database_url)
    with run_api(settings, database) as running:
        yield running
    database.close()


def closed_address():
    """An address at which nothing listens."""
    return f"http://127.0.0.1:{free_port()}"
