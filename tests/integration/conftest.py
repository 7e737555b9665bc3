"""A tiny model and a machine that serves it: over files with SQLite, over Redis with PostgreSQL."""

from contextlib import ExitStack

import pytest
from pydantic import SecretStr

from api.db.connection import Database
from api.dispatch import Dispatcher
from api.queue import create_celery
from api.settings import (
    DatabaseSettings,
    HubSettings,
    QueueSettings,
    ServerSettings,
    Settings,
    WorkerSettings,
)
from tests.integration.machine import TOKEN, Machine
from tests.servers import free_port
from tests.tiny_llama import save_tiny_llama


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder of local models; `tiny` has six decoder layers of about half a second each."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "tiny", layers=6)
    return folder


@pytest.fixture(params=["files", "servers"])
def form(request):
    """`files` is the one-machine form; `servers` has PostgreSQL and Redis."""
    return request.param


@pytest.fixture
def machine_settings(request, form, tmp_path, models):
    """Leases and pauses of seconds instead of minutes."""
    broker_url, url = None, None
    if form == "servers":
        server = request.getfixturevalue("redis_server")
        server.empty()
        broker_url, url = server.url, request.getfixturevalue("postgres_url")
    else:
        url = request.getfixturevalue("sqlite_url")
    return Settings(
        data_dir=tmp_path / "data",
        server=ServerSettings(port=free_port()),
        database=DatabaseSettings(url=url),
        queue=QueueSettings(
            broker_url=broker_url,
            relay_interval_s=0.1,
            reap_interval_s=0.3,
            republish_after_s=1.0,
        ),
        hub=HubSettings(token=SecretStr(TOKEN), model_roots={"models": models}),
        worker=WorkerSettings(lease_s=3.0, heartbeat_s=0.3, grace_s=10.0, threads=1, device="cpu"),
    )


@pytest.fixture
def open_machine(tmp_path):
    """Make a machine with settings of one's own."""
    with ExitStack() as stack:

        def open_with(settings):
            database = Database(settings.database_url)
            stack.callback(database.close)
            machine = Machine(settings, database, tmp_path)
            stack.callback(machine.stop)
            return machine

        yield open_with


@pytest.fixture
def open_dispatcher():
    """Run relay and reaper of a machine, as every API process does."""
    with ExitStack() as stack:

        def open_for(machine):
            celery = create_celery(machine.settings)
            stack.callback(celery.close)
            dispatcher = Dispatcher(machine.database, celery, machine.settings)
            dispatcher.start()
            stack.callback(dispatcher.stop)
            return dispatcher

        yield open_for


@pytest.fixture
def machine(open_machine, machine_settings):
    return open_machine(machine_settings)


@pytest.fixture
def dispatcher(open_dispatcher, machine):
    return open_dispatcher(machine)
