"""What the calibration process is told: one JSON object without secrets, paths resolved."""

from collections.abc import Mapping
from typing import Any

from api.db.tables.jobs import Job
from api.errors import InvalidRequest
from api.hub.base import TextUse
from api.hub.texts import BUILTIN, evaluation_texts, find_text, hub_text
from api.settings import Settings
from worker.texts import text_path
from worker.workspace import Workspace

__all__ = ["describe_job"]

EVALUATION_DEFAULTS: Mapping[str, Any] = {
    "enabled": True,
    "windows": 4,
    "length": 1024,
    "divergence": True,
    "tasks": [],
}


def describe_job(
    job: Job, workspace: Workspace, settings: Settings, missing: Mapping[str, str]
) -> dict[str, Any]:
    """Write the description of one attempt.

    Args:
        job: what is asked for.
        workspace: where the attempt reads and writes.
        settings: the operator's roots, threads and device.
        missing: texts of the Hub that could not be fetched for the evaluation, and why.

    Raises:
        InvalidRequest: the text that calibrates is no longer there.
    """
    task_dir = settings.worker.task_dir
    evaluation = {
        name: job.evaluation.get(name, default) for name, default in EVALUATION_DEFAULTS.items()
    }
    texts = [
        _describe_text(name, workspace, settings, missing)
        for name in evaluation_texts(job.evaluation)
    ]
    return {
        "source_dir": str(workspace.source),
        "out_dir": str(workspace.output),
        "state_dir": str(workspace.state),
        "spec": job.spec,
        "source": {"repo": job.model, "revision": job.source_sha},
        "calibration_text": _find_calibration(job, workspace, settings),
        "evaluation": evaluation | {"task_dir": None if task_dir is None else str(task_dir)},
        "evaluation_texts": texts,
        "threads": settings.worker.threads,
        "device": settings.worker.device,
    }


def _find_calibration(job: Job, workspace: Workspace, settings: Settings) -> str | None:
    dataset = job.spec.get("calibration", {}).get("dataset", BUILTIN)
    return _find(dataset, TextUse.CALIBRATION, workspace, settings, "spec.calibration.dataset")


def _describe_text(
    name: str, workspace: Workspace, settings: Settings, missing: Mapping[str, str]
) -> dict[str, str | None]:
    if name in missing:
        return {"name": name, "path": None, "error": missing[name]}
    try:
        path = _find(name, TextUse.EVALUATION, workspace, settings, "evaluation.datasets")
    except InvalidRequest as error:
        # a text that only measures never costs the job
        return {"name": name, "path": None, "error": error.message}
    return {"name": name, "path": path, "error": None}


def _find(
    dataset: str, use: TextUse, workspace: Workspace, settings: Settings, param: str
) -> str | None:
    name = hub_text(dataset)
    if name is not None:
        return str(text_path(workspace.texts, name, use))
    path = find_text(settings.hub.text_roots, dataset, param=param)
    return None if path is None else str(path)
