"""What the calibration process is told: one JSON object without secrets, paths resolved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.db.tables.jobs import Job
from api.hub.texts import BUILTIN, find_text
from api.settings import Settings
from worker.workspace import Workspace

__all__ = ["describe_job"]

EVALUATION_DEFAULTS = {"enabled": True, "windows": 4, "length": 1024}


def describe_job(job: Job, workspace: Workspace, settings: Settings) -> dict[str, Any]:
    """Write the description of one attempt.

    Raises:
        InvalidRequest: a text that the job names is no longer there.
    """
    roots = settings.hub.text_roots
    calibration = job.spec.get("calibration", {})
    return {
        "source_dir": str(workspace.source),
        "out_dir": str(workspace.output),
        "state_dir": str(workspace.state),
        "spec": job.spec,
        "source": {"repo": job.model, "revision": job.source_sha},
        "calibration_text": _find(roots, calibration, "spec.calibration.dataset"),
        "evaluation": {
            name: job.evaluation.get(name, default) for name, default in EVALUATION_DEFAULTS.items()
        },
        "evaluation_text": _find(roots, job.evaluation, "evaluation.dataset"),
        "threads": settings.worker.threads,
        "device": settings.worker.device,
    }


def _find(roots: Mapping[str, Path], wanted: Mapping[str, Any], param: str) -> str | None:
    path = find_text(roots, wanted.get("dataset", BUILTIN), param=param)
    return None if path is None else str(path)
