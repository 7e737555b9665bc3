"""Running jobs: claim one, carry out the attempt, record how it ended, claim the next.

The database owns the job. This process holds a lease on it, and every write is fenced by that
lease: when it is lost, another worker has the job and this one stops without a word.
"""

import os
from dataclasses import dataclass

from api.db.connection import Database
from api.db.repositories.leases import ClaimedJob, LeaseLost, claim_job
from api.hub.base import ModelHub, TextSource
from api.settings import Settings
from api.storage.base import ObjectStore
from api.telemetry import bind_context, get_logger
from worker.attempt import Attempt
from worker.devices import Gpu, choose_gpu
from worker.failure import AttemptFailed, failure_of_error
from worker.lifeline import Lifeline
from worker.watch import Stopped, Watch
from worker.workspace import Workspace

__all__ = ["Supervisor"]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervisor:
    """What a worker process needs to run jobs."""

    settings: Settings
    database: Database
    hub: ModelHub
    texts: TextSource
    store: ObjectStore
    lifeline: Lifeline
    worker: str
    """A name that no other live worker has."""

    def run_until_idle(self) -> int:
        """Run one claimable job after the other; returns how many when none is left."""
        count = 0
        while not self.lifeline.is_cut():
            gpu = self._choose_gpu()
            claimed = self._claim(gpu)
            if claimed is None:
                break
            with bind_context(job_id=claimed.job.id, attempt=str(claimed.lease.attempt)):
                self._run(claimed, gpu)
            count += 1
        return count

    def _choose_gpu(self) -> Gpu | None:
        if self.settings.worker.device == "cpu":
            return None
        return choose_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def _claim(self, gpu: Gpu | None) -> ClaimedJob | None:
        with self.database.write() as session:
            return claim_job(
                session,
                worker=self.worker,
                lease_s=self.settings.worker.lease_s,
                free_vram_bytes=None if gpu is None else gpu.free_bytes,
            )

    def _run(self, claimed: ClaimedJob, gpu: Gpu | None) -> None:
        log.info("job_claimed", model=claimed.job.model)
        attempt = Attempt(
            settings=self.settings,
            hub=self.hub,
            texts=self.texts,
            store=self.store,
            job=claimed.job,
            watch=Watch(self.database, claimed.lease, self.settings.worker, self.lifeline),
            workspace=Workspace(
                work_dir=self.settings.work_dir,
                job_id=claimed.job.id,
                attempt=claimed.lease.attempt,
            ),
            gpu=gpu,
        )
        try:
            _bring_to_an_end(attempt)
        except LeaseLost:
            # nothing may be written any more, and the shared folders belong to the new holder
            log.warning("lease_lost")
            attempt.workspace.drop_output()


def _bring_to_an_end(attempt: Attempt) -> None:
    try:
        attempt.run()
    except LeaseLost:
        raise
    except Stopped as stopped:
        attempt.stop(stopped.reason)
    except AttemptFailed as failed:
        attempt.fail(failed.failure)
    except Exception as error:
        # the outermost border: whatever it was, the job must learn of it
        log.exception("attempt_failed")
        attempt.fail(failure_of_error(error))
