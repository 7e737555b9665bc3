"""How workers are woken: the one Celery configuration, and the row that asks for a wake-up."""

import json
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu.transport import filesystem
from sqlalchemy.orm import Session
from typing_extensions import override

from api.db.repositories.outbox import TaskName, put_wakeup
from api.settings import Settings

__all__ = ["QUEUE", "FileTransport", "TaskName", "create_celery", "submit_job"]

QUEUE = "abq"
FILESYSTEM = "filesystem://"
SOFT_SHUTDOWN_S = 60


def create_celery(settings: Settings) -> Celery:
    """Make the Celery app that API and workers share; it connects to nothing yet."""
    celery = Celery("abq", broker=settings.broker_url)
    celery.conf.update(
        task_default_queue=QUEUE,
        # only ever a job id, and never pickle
        accept_content=["json"],
        task_serializer="json",
        # state lives in the jobs table: no results, and a message is spent when it arrives. A
        # lost one is sent again by the reaper, where late acknowledgement runs jobs twice
        task_ignore_result=True,
        task_acks_late=False,
        # the supervisor enforces deadlines and the lease decides what a lost connection means
        task_time_limit=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_soft_shutdown_timeout=SOFT_SHUTDOWN_S,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        # the outbox keeps what could not be sent, so a send fails at once
        task_publish_retry=False,
        broker_transport_options=_transport_options(settings),
    )
    if settings.broker_url.startswith("redis"):
        celery.conf.worker_disable_prefetch = True
    if settings.broker_url == FILESYSTEM:
        # kombu remarks on a URL without a host, even where there is none
        celery.conf.update(
            broker_url=f"{FILESYSTEM}localhost", broker_transport="api.queue:FileTransport"
        )
    return celery


class FileChannel(filesystem.Channel):
    """Puts whole messages into the folder.

    kombu's own channel creates the file first and fills it then; a worker that looks in between
    takes an empty message and ends. That happened to 47 of 3000 messages under constant polling.
    """

    # kombu calls it by position, and names its arguments differently in each of its own classes
    @override
    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]
        """Write a message under a name that no reader takes, then rename it."""
        folder = Path(self.data_folder_out)
        # readers take the oldest name first
        name = f"{round(time.monotonic() * 1000)}_{uuid4()}.{queue}.msg"
        unfinished = folder / f".{name}.part"
        unfinished.write_text(json.dumps(payload))
        unfinished.replace(folder / name)


class FileTransport(filesystem.Transport):
    """kombu's filesystem transport with messages that appear at once."""

    Channel = FileChannel


def submit_job(session: Session, job_id: str) -> None:
    """Have a worker woken for a job; the message leaves once this transaction has committed."""
    put_wakeup(session, job_id)


def _transport_options(settings: Settings) -> dict[str, Any]:
    if settings.broker_url.startswith("redis"):
        return {
            "visibility_timeout": 3600,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        }
    if settings.broker_url != FILESYSTEM:
        return {}
    messages = settings.broker_dir / "messages"
    control = settings.broker_dir / "control"
    for folder in (messages, control):
        folder.mkdir(parents=True, exist_ok=True)
    return {
        "data_folder_in": str(messages),
        "data_folder_out": str(messages),
        "control_folder": str(control),
        "polling_interval": 0.5,
    }
