"""`python -m api`: the control plane as a process; `python -m api openapi` describes it."""

import json
import sys
import time
from types import FrameType

import uvicorn
from sqlalchemy.exc import OperationalError, ProgrammingError
from typing_extensions import override

from api.app import create_app
from api.db.connection import Database
from api.db.migrations import upgrade_database
from api.hub.routing import create_hub
from api.queue import create_celery
from api.routes.interface import Interface
from api.services.inference import InferenceClient
from api.services.keys import create_first_key
from api.services.limits import KeyLimits
from api.settings import Settings
from api.storage.local import create_store
from api.telemetry import configure_logging

__all__ = ["main"]

SHUTDOWN_S = 3
"""Open streams are cut after this; readers of events come back with `Last-Event-ID`."""


class DrainingServer(uvicorn.Server):
    """Finishes the generations that run before it stops; meanwhile it is not ready."""

    def __init__(self, config: uvicorn.Config, limits: KeyLimits, *, drain_s: float) -> None:
        super().__init__(config)
        self._limits = limits
        self._drain_s = drain_s
        self._drain_until: float | None = None

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; a second signal stops at once."""
        if self._drain_until is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        self._drain_until = time.monotonic() + self._drain_s
        self._limits.stop()

    @override
    async def on_tick(self, counter: int) -> bool:
        """Let uvicorn stop once nothing runs any more, or the time is over."""
        if self._drain_until is not None:
            is_idle = self._limits.running == 0
            self.should_exit |= is_idle or time.monotonic() >= self._drain_until
        return await super().on_tick(counter)


def main() -> None:
    """Serve until told to stop, or print the OpenAPI document."""
    if sys.argv[1:] == ["openapi"]:
        sys.stdout.write(json.dumps(Interface().openapi(), indent=2) + "\n")
        return
    settings = Settings()
    configure_logging(settings.log_level)
    database = Database(settings.database_url)
    _prepare(settings, database)
    app = create_app(
        settings,
        database=database,
        store=create_store(settings),
        hub=create_hub(settings),
        celery=create_celery(settings),
        inference=InferenceClient(settings.inference),
    )
    config = uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    DrainingServer(config, app.state.ports.limits, drain_s=settings.server.drain_s).run()


def _prepare(settings: Settings, database: Database) -> None:
    """Make the first key; a database of one's own is migrated, another one is the operator's."""
    if settings.database.url is None:
        upgrade_database(settings.database_url)
    try:
        key = create_first_key(database)
    except (OperationalError, ProgrammingError) as error:
        sys.exit(
            f"The database does not answer, or lacks its tables: run `abq migrate`. {error.orig}"
        )
    if key is not None:
        # to the terminal and not to the log, which others may read and which keeps things
        sys.stdout.write(f"First API key, shown only now: {key}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
