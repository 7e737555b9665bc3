"""Runs migrations on one connection: alone, in one transaction, and never waiting for long."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON, Connection, text

from api.db.base import Base, UtcDateTime
from api.db.connection import Database
from api.db.tables import access, artifacts, jobs
from api.settings import Settings

# autogenerate compares with what these modules declare
DECLARED = (access, artifacts, jobs)

MIGRATION_LOCK = 0x6162_7101
"""Number of the advisory lock that keeps two migrations apart."""
LOCK_TIMEOUT = "5s"
"""A migration that waits for a table holds up everyone behind it."""
STATEMENT_TIMEOUT = "10min"


def migrate() -> None:
    """Run what the Alembic command asked for on the database of the caller, or of the settings."""
    url = context.config.attributes.get("url") or Settings().database_url
    database = Database(url)
    try:
        if database.engine.dialect.name == "sqlite":
            _migrate_sqlite(database)
        else:
            with database.engine.connect() as connection, connection.begin():
                _guard_postgres(connection)
                _run(connection)
    finally:
        database.close()


def _guard_postgres(connection: Connection) -> None:
    # the lock comes first: whoever waits here waits for the other migration to end, not for 5 s
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'"))


def _migrate_sqlite(database: Database) -> None:
    writing = database.engine.execution_options(abq_write=True)
    with writing.connect() as connection:
        # SQLite changes a column by copying its table and dropping the old one, which would
        # delete all rows that refer to it; the pragma has no effect inside a transaction
        driver = connection.connection.driver_connection
        assert driver is not None  # noqa: S101 - an open connection has one
        driver.execute("PRAGMA foreign_keys=OFF")
        with connection.begin():
            _run(connection)
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise RuntimeError(f"the migration leaves {len(broken)} dangling references")


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        # SQLite cannot alter columns in place, but takes every other statement in a transaction
        render_as_batch=True,
        render_item=_render_type,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _render_type(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    # a migration must not change when the types of the service do
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, JSON):
        autogen.imports.add("from sqlalchemy.dialects.postgresql import JSONB")
        return 'sa.JSON().with_variant(JSONB(), "postgresql")'
    return False


migrate()
