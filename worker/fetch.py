"""A job's source model on local disk: the pinned revision, allow-listed files, checked headers."""

from pathlib import Path

from api.db.tables.jobs import Job
from api.errors import RevisionNotFound
from api.hub.base import ModelHub, OnProgress, RemoteFile, ResolvedModel
from api.hub.local import inspect_folder

__all__ = ["fetch_source"]


def fetch_source(hub: ModelHub, job: Job, folder: Path, on_progress: OnProgress) -> None:
    """Bring the job's model into `folder`; goes on from what an earlier attempt left there.

    An exception from `on_progress` stops it; what has arrived stays.

    Raises:
        ServiceError: the model is gone, has changed, or is not what was accepted.
    """
    resolved = hub.resolve(job.model, job.source_sha)
    if resolved.sha != job.source_sha:
        raise RevisionNotFound(
            f"{job.model} was accepted at {job.source_sha}, which resolves to {resolved.sha} now.",
            param="revision",
        )
    hub.download(resolved, folder, on_progress)
    _check_source(resolved, folder)


def _check_source(resolved: ResolvedModel, folder: Path) -> None:
    files = tuple(
        RemoteFile(path=path.name, bytes=path.stat().st_size) for path in sorted(folder.iterdir())
    )
    # the headers were checked over the network; these are the bytes that will be read
    inspect_folder(ResolvedModel(model=resolved.model, sha=resolved.sha, files=files), folder)
