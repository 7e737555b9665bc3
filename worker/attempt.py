"""One attempt of a job, from the model's download to the artifact's commit."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, assert_never

from api.db.repositories.leases import LeaseLost, cancel_job_finished, fail_job, release_job
from api.db.tables.jobs import Job, JobStatus
from api.errors import DiskTooSmall, HubUnavailable, ServiceError
from api.hub.base import ModelHub, TextSource
from api.settings import Settings
from api.storage.base import ObjectStore
from api.telemetry import get_logger
from engine.events import Stage
from worker.background import BackgroundWork, Reporter
from worker.child_process import ChildProcess, scrub_environment
from worker.devices import Gpu
from worker.failure import AttemptFailed, Failure, failure_of_child, failure_of_error
from worker.fetch import fetch_source
from worker.job_file import describe_job
from worker.outcome import Outcome, Push
from worker.publish import publish_to_hub, store_artifact
from worker.texts import fetch_calibration, fetch_evaluation
from worker.watch import StopReason, Watch
from worker.workspace import Workspace

__all__ = ["Attempt"]

log = get_logger(__name__)

T = TypeVar("T")

HUB_PAUSES_S = (2.0, 8.0, 20.0)
"""Waits between tries while the Hub does not answer; then the attempt fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Everything one attempt works with."""

    settings: Settings
    hub: ModelHub
    texts: TextSource
    store: ObjectStore
    job: Job
    watch: Watch
    workspace: Workspace
    gpu: Gpu | None

    def run(self) -> None:
        """Carry the job to its artifact.

        Raises:
            Stopped: on request; call `stop`.
            AttemptFailed: call `fail`.
            LeaseLost: the job is another worker's now.
        """
        self._enter(Stage.VALIDATING)
        self.workspace.prepare()
        self._drop_stored(range(1, self.workspace.attempt))
        self._check_disk()
        self._enter(Stage.DOWNLOADING)
        self._in_background("fetch", lambda reporter: _insist(reporter, self._fetch))
        missing = self._in_background("texts", self._fetch_texts)
        report = self._calibrate(missing)
        self._enter(Stage.UPLOADING)
        self._keep(report)

    def stop(self, reason: StopReason) -> None:
        """End the attempt that was stopped; what is calibrated stays for the next one."""
        self._drop_made()
        match reason:
            case StopReason.CANCELLED:
                self.workspace.drop_source()
                self.watch.settle(cancel_job_finished)
            case StopReason.SHUTDOWN:
                self.watch.settle(release_job)
            case _:
                assert_never(reason)
        log.info("job_stopped", reason=reason)

    def fail(self, failure: Failure) -> None:
        """End the attempt that failed; another one starts behind the last layer checkpoint."""
        self._drop_made()
        if not failure.is_transient:
            self.workspace.drop_source()
        status = self.watch.settle(
            lambda session, lease: fail_job(
                session, lease, error=failure.to_json(), retry=failure.is_transient
            )
        )
        log.warning("attempt_ended", code=failure.code, status=status)
        if status != JobStatus.QUEUED:
            self.workspace.drop_source()

    def _enter(self, stage: Stage) -> None:
        self.watch.record({"type": "stage.started", "stage": stage.value})

    def _check_disk(self) -> None:
        # the estimate was made when the job was created; the disk has changed since
        needed = int(self.job.estimate.get("disk_needed_bytes", 0))
        free = shutil.disk_usage(self.workspace.root).free + self.workspace.used_bytes()
        if free < needed:
            raise DiskTooSmall(f"the worker's disk has {free} bytes free of {needed} needed")

    def _fetch(self, reporter: Reporter) -> None:
        def on_progress(done: int, total: int) -> None:
            reporter.report("download.progress", bytes=done, total=total)

        fetch_source(self.hub, self.job, self.workspace.source, on_progress)

    def _fetch_texts(self, reporter: Reporter) -> Mapping[str, str]:
        folder = self.workspace.texts
        _insist(reporter, lambda each: fetch_calibration(self.texts, self.job, folder, each.check))
        return fetch_evaluation(
            self.texts,
            self.job,
            folder,
            lambda fetch: _insist(reporter, lambda each: fetch(each.check)),
        )

    def _calibrate(self, missing: Mapping[str, str]) -> dict[str, Any]:
        description = describe_job(self.job, self.workspace, self.settings, missing)
        gpu_uuid = None if self.gpu is None else self.gpu.uuid
        child = ChildProcess.start(
            self.workspace.write_job_file(description),
            environment=scrub_environment(os.environ, gpu_uuid),
            log_path=self.workspace.log,
        )
        try:
            self.watch.follow(child)
        finally:
            child.close()
        failure = failure_of_child(child)
        if failure is not None:
            raise AttemptFailed(failure)
        report: dict[str, Any] = (child.final or {})["report"]
        return report

    def _keep(self, report: dict[str, Any]) -> None:
        output, artifact_id = self.workspace.output, self._artifact_id(self.workspace.attempt)
        stored = self._in_background(
            "store", lambda _: store_artifact(self.store, artifact_id, output)
        )
        if stored.manifest_sha256 != report["manifest_sha256"]:
            message = "the artifact changed between its making and its storing"
            raise AttemptFailed(Failure(code="checkpoint_invalid", message=message))
        push = self._publish()
        outcome = Outcome(
            job=self.job,
            artifact_id=artifact_id,
            report={**report, "publish_error": push.error},
            stored=stored,
            published=push.published,
        )
        self.watch.settle(outcome.commit)
        log.info("job_succeeded", artifact_id=artifact_id)
        self.workspace.drop_all()

    def _publish(self) -> Push:
        """Push where the job asks for it. A push that is refused never costs the artifact."""
        output = self.workspace.output
        try:
            published = self._in_background(
                "publish",
                lambda reporter: _insist(
                    reporter, lambda each: publish_to_hub(self.hub, self.job, output, each.check)
                ),
            )
        except LeaseLost:
            raise
        except ServiceError as error:
            failure = failure_of_error(error)
            if failure.is_transient and self.job.attempt < self.job.max_attempts:
                raise
            refusal = failure.to_json()
            self.watch.record({"type": "publish.failed", **refusal})
            return Push(error=refusal)
        return Push(published=published)

    def _in_background(self, name: str, run: Callable[[Reporter], T]) -> T:
        work = BackgroundWork(run, name=name)
        self.watch.follow(work)
        return work.result()

    def _drop_made(self) -> None:
        self.workspace.drop_output()
        self._drop_stored(range(self.workspace.attempt, self.workspace.attempt + 1))

    def _drop_stored(self, attempts: range) -> None:
        for attempt in attempts:
            self.store.delete(self._artifact_id(attempt))

    def _artifact_id(self, attempt: int) -> str:
        # one id an attempt: what an earlier one left in the store is found and never mixed in
        return f"art_{self.job.id.removeprefix('job_')}_{attempt}"


def _insist(reporter: Reporter, call: Callable[[Reporter], T]) -> T:
    """Call again after a pause while the Hub does not answer."""
    for pause_s in HUB_PAUSES_S:
        try:
            return call(reporter)
        except HubUnavailable as error:
            log.warning("hub_unavailable", pause_s=pause_s, error=error.message)
            reporter.pause(pause_s)
    return call(reporter)
