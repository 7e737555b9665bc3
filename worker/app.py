"""The worker's Celery app: the shared configuration, own logging, and the lifeline to the pool."""

from typing import Any

from celery import Celery, signals

from api.queue import create_celery
from api.settings import Settings
from api.telemetry import configure_logging
from worker.lifeline import Lifeline

__all__ = ["create_app", "worker_arguments"]


def create_app(settings: Settings, lifeline: Lifeline) -> Celery:
    """Make the app of one worker; call it once a process, since Celery's signals are global."""

    def set_up_logging(**_: Any) -> None:
        configure_logging(settings.log_level)

    def let_go(**_: Any) -> None:
        lifeline.let_go()

    # connected handlers keep Celery from installing its own
    signals.setup_logging.connect(set_up_logging, weak=False)
    # in the main process this cuts the line, in a pool process it leaves the end to the main one
    signals.worker_shutting_down.connect(let_go, weak=False)
    signals.worker_process_init.connect(let_go, weak=False)
    return create_celery(settings)


def worker_arguments(name: str) -> list[str]:
    """What `celery` is started with.

    Prefork, so that the main process answers while the pool process supervises a job for hours;
    no gossip and no mingle, which cost messages and are of no use to workers that share a database.
    """
    return [
        "worker",
        f"--hostname={name}",
        "--pool=prefork",
        "--concurrency=1",
        "--without-gossip",
        "--without-mingle",
        "--loglevel=INFO",
    ]
