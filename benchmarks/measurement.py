"""One measurement on disk: rows beside the hardware, versions and commit they came from."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["MEASUREMENTS", "write_measurement"]

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")
PEERS = ("auto-round", "llmcompressor", "compressed-tensors", "humming-kernels", "gemlite")


def write_measurement(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    folder: Path = MEASUREMENTS,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `<name>.json` with `rows` and where they were measured; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _read_commit(),
        "hardware": _describe_hardware(),
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in PACKAGES},
            **_find_peers(),
        },
        **({} if settings is None else {"settings": settings}),
        "rows": list(rows),
    }
    path = folder / f"{name}.json"
    # an earlier file stays whole until the new one is
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)
    return path


def _find_peers() -> dict[str, str]:
    installed = {each.name.lower() for each in metadata.distributions()}
    return {name: metadata.version(name) for name in PEERS if name in installed}


def _describe_hardware() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpu": _read_cpu_name(), "cores": len(os.sched_getaffinity(0))}


def _read_cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _read_commit() -> str:
    # a copy of the tree with another history, or none, is told
    told = os.environ.get("ABQ_COMMIT")
    if told:
        return told
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"
