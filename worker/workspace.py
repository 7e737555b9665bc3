"""The folders of one job on the worker's disk.

    <work_dir>/<job_id>/source       the downloaded model; dropped when the job ends
    <work_dir>/<job_id>/texts        texts of the Hub; dropped with the job
    <work_dir>/<job_id>/state        layer checkpoints of all attempts; dropped on success
    <work_dir>/<job_id>/attempt-<n>  output and log of one attempt

A failed or cancelled job keeps its layer checkpoints and its logs: a retry starts behind them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Workspace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where one attempt of a job reads and writes."""

    work_dir: Path
    job_id: str
    attempt: int

    @property
    def root(self) -> Path:
        """Everything of the job."""
        return self.work_dir / self.job_id

    @property
    def source(self) -> Path:
        """The model to quantize."""
        return self.root / "source"

    @property
    def texts(self) -> Path:
        """Texts of the Hub, fetched once for all attempts."""
        return self.root / "texts"

    @property
    def state(self) -> Path:
        """Layer checkpoints."""
        return self.root / "state"

    @property
    def attempt_dir(self) -> Path:
        """What only this attempt writes."""
        return self.root / f"attempt-{self.attempt}"

    @property
    def output(self) -> Path:
        """The artifact in the making; the engine creates it."""
        return self.attempt_dir / "artifact"

    @property
    def log(self) -> Path:
        """Standard error of the calibration process."""
        return self.attempt_dir / "child.log"

    def prepare(self) -> None:
        """Make the folders and drop the outputs that earlier attempts left behind."""
        for left_over in self.root.glob("attempt-*/artifact*"):
            shutil.rmtree(left_over, ignore_errors=True)
        for folder in (self.source, self.state, self.attempt_dir):
            folder.mkdir(parents=True, exist_ok=True)

    def used_bytes(self) -> int:
        """Bytes that the job holds already, mostly a download of an earlier attempt."""
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)

    def write_job_file(self, description: dict[str, Any]) -> Path:
        """Write what the calibration process is to do; it holds no secret."""
        path = self.attempt_dir / "job.json"
        path.write_text(json.dumps(description, indent=2))
        return path

    def drop_output(self) -> None:
        """Remove what this attempt made."""
        for folder in self.attempt_dir.glob("artifact*"):
            shutil.rmtree(folder, ignore_errors=True)

    def drop_source(self) -> None:
        """Remove the copy of the model."""
        shutil.rmtree(self.source, ignore_errors=True)

    def drop_all(self) -> None:
        """Remove everything of the job."""
        shutil.rmtree(self.root, ignore_errors=True)
