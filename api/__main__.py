"""`python -m api`: the control plane as a process."""

import sys

import uvicorn

from api.app import create_app
from api.db.connection import Database
from api.hub.routing import create_hub
from api.queue import create_celery
from api.services.inference import InferenceClient
from api.services.keys import create_first_key
from api.settings import Settings
from api.storage.local import create_store
from api.telemetry import configure_logging

__all__ = ["main"]

SHUTDOWN_S = 10
"""Open event streams are cut after this; clients come back with `Last-Event-ID`."""


def main() -> None:
    """Serve until told to stop; shows the first API key when it makes one."""
    settings = Settings()
    configure_logging(settings.log_level)
    database = Database(settings.database_url)
    first_key = create_first_key(database)
    if first_key is not None:
        # to the terminal and not to the log, which others may read and which keeps things
        sys.stdout.write(f"First API key, shown only now: {first_key}\n")
        sys.stdout.flush()
    app = create_app(
        settings,
        database=database,
        store=create_store(settings),
        hub=create_hub(settings),
        celery=create_celery(settings),
        inference=InferenceClient(settings.inference),
    )
    uvicorn.run(
        app,
        host=settings.server.host,
        port=settings.server.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


if __name__ == "__main__":
    main()
