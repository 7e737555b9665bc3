"""What a worker's event changes: the job's stage and progress, and the results of its layers."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from api.db.tables.jobs import Job, JobLayer

__all__ = ["fold_event"]


def fold_event(session: Session, job: Job, kind: str, data: Mapping[str, Any]) -> None:
    """Bring a job and its layers up to date with an event of its worker."""
    match kind:
        case "stage.started":
            job.stage, job.progress = str(data["stage"]), None
        case "progress":
            job.progress = {key: data[key] for key in ("done", "total", "unit")}
        case "download.progress":
            job.progress = {"done": data["bytes"], "total": data["total"], "unit": "bytes"}
        case "layer.started":
            job.progress = {"done": data["index"], "total": data["total"], "unit": "layers"}
            _layer_of(session, job.id, data).bits = dict(data["bits"])
        case "layer.finished":
            job.progress = {"done": data["index"] + 1, "total": data["total"], "unit": "layers"}
            _fold_result(_layer_of(session, job.id, data), data)
        case _:
            pass


def _layer_of(session: Session, job_id: str, data: Mapping[str, Any]) -> JobLayer:
    layer = session.get(JobLayer, (job_id, data["index"]))
    if layer is None:
        layer = JobLayer(job_id=job_id, index=data["index"], name=data["name"], bits={})
        session.add(layer)
    return layer


def _fold_result(layer: JobLayer, data: Mapping[str, Any]) -> None:
    layer.loss_before = data["loss_before"]
    layer.loss_after = data["loss_after"]
    layer.seconds = data["seconds"]
    layer.memory_bytes = data["memory_bytes"]
    layer.resumed = data.get("resumed", False)
