"""The worker's Celery tasks: a message wakes the worker, the database says what to run."""

from collections.abc import Callable

from celery import Celery

from api.queue import TaskName
from api.telemetry import get_logger
from worker.supervise import Supervisor

__all__ = ["register_tasks"]

log = get_logger(__name__)


def register_tasks(celery: Celery, create_supervisor: Callable[[], Supervisor]) -> None:
    """Add the task to an app.

    Args:
        celery: the app.
        create_supervisor: called in the pool process for each message; database connections
            must not cross a fork.
    """

    @celery.task(name=TaskName.RUN_JOB)  # type: ignore[untyped-decorator]  # celery has no types
    def run_job(job_id: str) -> None:
        # the id is a hint only: the claim chooses fairly among all queued jobs
        log.info("worker_woken", job_id=job_id)
        supervisor = create_supervisor()
        try:
            supervisor.run_until_idle()
        finally:
            supervisor.database.close()
