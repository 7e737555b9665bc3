"""One database: PostgreSQL or SQLite behind the same two transactions, `read` and `write`."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.orm import Session

__all__ = ["Database", "database_now"]

BUSY_TIMEOUT_MS = 15_000


class Database:
    """Opens transactions on one engine. Threads may share it; processes may not."""

    def __init__(self, url: str) -> None:
        self.engine = _create_engine(url)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block and rolls back on any exception.

        On SQLite it takes the write lock at once, so that a read inside it cannot go stale.
        """
        bind = self.engine.execution_options(abq_write=True)
        with Session(bind, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that is always rolled back."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()


def database_now(session: Session) -> datetime:
    """Read the database's clock, the only clock that leases are compared with."""
    if session.get_bind().dialect.name == "sqlite":
        moment = session.scalar(text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')"))
        return datetime.fromisoformat(str(moment)).replace(tzinfo=UTC)
    # clock_timestamp moves inside a transaction, now() does not
    now: datetime = session.scalar(text("SELECT clock_timestamp()"))
    return now.astimezone(UTC)


def _create_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    # the driver's own BEGIN comes too late for a consistent read; _begin_sqlite issues it
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    is_write = connection.get_execution_options().get("abq_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")
