"""Cases spread over devices: one process a row, each with a time-out of its own.

A peer that crashes, hangs or runs out of memory costs its own row, which then says why.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any

from benchmarks.case import Case

__all__ = ["Schedule"]

ROOT = Path(__file__).resolve().parents[1]
ERROR_CHARACTERS = 400
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How cases are run."""

    jobs: int
    """Rows at a time."""
    gpus: Sequence[str] = ()
    """Indices of the GPUs that rows take in turn; none leaves the choice to each case."""
    timeout_s: float
    log_dir: Path | None = None
    """Where the output of every row is kept."""
    _free: "Queue[int]" = field(default_factory=Queue, init=False)

    def run(self, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
        """Give rows as they are finished."""
        for slot in range(self.jobs):
            self._free.put(slot)
        with ThreadPoolExecutor(self.jobs) as pool:
            for finished in as_completed([pool.submit(self._run, case) for case in cases]):
                yield finished.result()

    def _run(self, case: Case) -> dict[str, Any]:
        slot = self._free.get()
        try:
            with tempfile.TemporaryDirectory() as folder:
                return self._run_in(Path(folder), case, slot)
        finally:
            self._free.put(slot)

    def _run_in(self, folder: Path, case: Case, slot: int) -> dict[str, Any]:
        case_file, row_file = folder / "case.json", folder / "row.json"
        placed = replace(case, device="cuda") if self.gpus else case
        case_file.write_text(json.dumps(placed.to_json()))
        command = [sys.executable, "-m", "benchmarks.case_measurement"]
        log = self._log_path(folder, case)
        failed = case.identity
        with log.open("wb") as output:
            try:
                # packages leave logs and caches where they are started
                status = subprocess.run(
                    [*command, str(case_file), str(row_file)],
                    cwd=folder,
                    env=self._environment(slot),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=self.timeout_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return failed | {"error": f"not done after {self.timeout_s:g} s"}
        if not row_file.is_file():
            return failed | {"error": f"exit status {status}: {_last_words(log)}"}
        row: dict[str, Any] = json.loads(row_file.read_bytes())
        return row

    def _log_path(self, folder: Path, case: Case) -> Path:
        kept = folder if self.log_dir is None else self.log_dir
        kept.mkdir(parents=True, exist_ok=True)
        variant = "".join(f"-{name}-{value}" for name, value in case.ingredients.items())
        return kept / f"{case.config.replace('*', 's')}-{case.method}{variant}.log"

    def _environment(self, slot: int) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        placed = {"PYTHONPATH": os.pathsep.join(paths), **OFFLINE}
        if self.gpus:
            placed["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            placed["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        return {**os.environ, **placed}


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-ERROR_CHARACTERS:] if lines else "it said nothing"
