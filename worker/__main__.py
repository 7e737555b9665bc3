"""`python -m worker`: one worker, which runs one job at a time."""

import socket

from ulid import ULID

from api.db.connection import Database
from api.hub.routing import create_hub, create_texts
from api.settings import Settings
from api.storage.local import create_store
from api.telemetry import configure_logging
from worker.app import create_app, worker_arguments
from worker.lifeline import Lifeline
from worker.supervise import Supervisor
from worker.tasks import register_tasks


def main() -> None:
    """Run until a signal ends it."""
    settings = Settings()
    configure_logging(settings.log_level)
    # a host may run several workers, and a restarted one must not pass for its predecessor
    name = f"{ULID()}@{socket.gethostname()}"
    lifeline = Lifeline.open()
    celery = create_app(settings, lifeline)

    def create_supervisor() -> Supervisor:
        return Supervisor(
            settings=settings,
            database=Database(settings.database_url),
            hub=create_hub(settings),
            texts=create_texts(settings),
            store=create_store(settings),
            lifeline=lifeline,
            worker=name,
        )

    register_tasks(celery, create_supervisor)
    celery.worker_main(worker_arguments(name))


if __name__ == "__main__":
    main()
