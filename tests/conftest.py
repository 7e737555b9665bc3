"""Servers, databases and queues for every test that asks for one.

`database` comes as SQLite and as PostgreSQL, `celery` over files and over Redis: a test that takes
both runs in all four combinations.
"""

import os
import shutil
from uuid import uuid4

import pytest

from api.db.connection import Database
from api.db.migrations import upgrade_database
from api.db.repositories.access import get_or_create_tenant
from api.queue import create_celery
from api.services.jobs import NewJob, create_job
from api.settings import DatabaseSettings, QueueSettings, Settings, configure_hub_client
from tests.fake_hub import run_fake_hub
from tests.servers import run_postgres, run_redis

# before anything else imports huggingface_hub, which reads its environment once
configure_hub_client()


@pytest.fixture(scope="session")
def hub_server():
    with run_fake_hub() as server:
        yield server


@pytest.fixture
def fake_hub(hub_server):
    """The fake Hub of the run, empty."""
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="session")
def postgres_server():
    with run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_template(postgres_server):
    """The name of a migrated database; a copy of it takes a fraction of the migrations."""
    name = f"abq_template_{os.getpid()}"
    upgrade_database(postgres_server.create(name))
    yield name
    postgres_server.drop(name)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "abq.db"
    upgrade_database(f"sqlite:///{path}")
    return path


@pytest.fixture
def empty_postgres_url(postgres_server):
    """A database without any table."""
    name = f"abq_{uuid4().hex}"
    yield postgres_server.create(name)
    postgres_server.drop(name)


@pytest.fixture
def postgres_url(postgres_server, postgres_template):
    name = f"abq_{uuid4().hex}"
    yield postgres_server.create(name, postgres_template)
    postgres_server.drop(name)


@pytest.fixture
def sqlite_url(sqlite_template, tmp_path):
    path = tmp_path / "abq.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request):
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def database(database_url):
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def redis_server():
    with run_redis() as server:
        yield server


@pytest.fixture
def mortal_redis():
    """A Redis of the test's own, to kill and to start again."""
    with run_redis(own=True) as server:
        yield server


@pytest.fixture(params=["filesystem", "redis"])
def broker_url(request):
    """None is the filesystem broker in the data directory of the settings."""
    if request.param == "filesystem":
        return None
    server = request.getfixturevalue("redis_server")
    server.empty()
    return server.url


@pytest.fixture
def settings(tmp_path, database_url):
    return Settings(data_dir=tmp_path / "data", database=DatabaseSettings(url=database_url))


@pytest.fixture
def celery(settings, broker_url):
    queue = QueueSettings(broker_url=broker_url)
    app = create_celery(settings.model_copy(update={"queue": queue}))
    yield app
    app.close()


@pytest.fixture
def tenant_id(database):
    with database.write() as session:
        return get_or_create_tenant(session, "default").id


@pytest.fixture
def queue_job(database, settings, tenant_id):
    """Create a job as the API does; keywords replace fields of the request."""

    def create(owner=tenant_id, **fields):
        wanted = {
            "model": "acme/tiny",
            "revision": None,
            "source_sha": "f" * 40,
            "spec": {"w_bits": 4},
            "evaluation": {"enabled": False},
        }
        return create_job(database, settings, owner, NewJob(**(wanted | fields)))

    return create
