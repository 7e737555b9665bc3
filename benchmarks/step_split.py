"""Where the time of a step goes: linear layers, attention, other kernels, and gaps.

A profile gives every kernel of a few steps. Kernels may overlap, for one can be told to start while
another still runs; then each moment belongs to the one that started first, because the later one
waits for it. What belongs to none is a gap, counted against the time that a step takes unwatched.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["KernelRun", "Part", "StepSplit", "profile_steps", "split_runs"]


class Part(StrEnum):
    """What a kernel belongs to."""

    LINEAR = "linear"
    """Products with weights, the head's too."""
    ATTENTION = "attention"
    """Over keys and values."""
    OTHER = "other"
    """Norms, codes, gates, appends, draws, copies."""


LINEAR = re.compile(
    r"linear_kernel|half_decode_kernel|^_half_kernel|^_order_kernel|_tile_kernel|_prefill_kernel|groups_kernel"
    r"|bmma|_unpack|gemm|gemv|cutlass|nvjet|splitK|cublas",
    re.IGNORECASE,
)
ATTENTION = re.compile(r"^_decode_kernel$|^_combine(_tokens)?_kernel$|^_prefill_kernel$|flash|fmha")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRun:
    """One launch."""

    name: str
    start_us: float
    us: float
    grid: tuple[int, ...] = ()

    @property
    def part(self) -> Part:
        """By name; two kernels are called the same, and only attention has a second axis."""
        is_attention = bool(ATTENTION.search(self.name))
        if is_attention and self.name == "_prefill_kernel":
            is_attention = len(self.grid) > 1 and self.grid[1] > 1
        if is_attention:
            return Part.ATTENTION
        return Part.LINEAR if LINEAR.search(self.name) else Part.OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSplit:
    """Milliseconds of one step."""

    parts_ms: Mapping[Part, float]
    gaps_ms: float
    launches: float
    """Kernels of one step."""

    def to_json(self) -> dict[str, float]:
        """For a row."""
        parts = {f"{part}_ms": round(self.parts_ms[part], 4) for part in Part}
        return {**parts, "gaps_ms": round(self.gaps_ms, 4), "launches": round(self.launches, 1)}


def profile_steps(run: Callable[[], None], steps: int, ms_per_step: float) -> StepSplit | None:
    """Profile some steps; None where there is no GPU, or nothing to see of it.

    Args:
        run: runs that many steps and waits for them.
        steps: of one run.
        ms_per_step: measured without a profile.
    """
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        runs = list(_read_runs(json.loads(trace.read_text())))
    return split_runs(runs, steps, ms_per_step) if runs else None


def split_runs(runs: Iterable[KernelRun], steps: int, ms_per_step: float) -> StepSplit:
    """Give every moment to a part.

    Args:
        runs: of all steps.
        steps: how many.
        ms_per_step: what remains of it is gaps.
    """
    ordered = sorted(runs, key=lambda each: each.start_us)
    parts_us = dict.fromkeys(Part, 0.0)
    end_us = float("-inf")
    for run in ordered:
        alone_us = run.start_us + run.us - max(run.start_us, end_us)
        parts_us[run.part] += max(0.0, alone_us)
        end_us = max(end_us, run.start_us + run.us)
    parts_ms = {part: us / steps / 1e3 for part, us in parts_us.items()}
    return StepSplit(
        parts_ms=parts_ms,
        gaps_ms=max(0.0, ms_per_step - sum(parts_ms.values())),
        launches=len(ordered) / steps,
    )


def _read_runs(trace: Mapping[str, Any]) -> Iterable[KernelRun]:
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield KernelRun(
                name=event["name"],
                start_us=float(event["ts"]),
                us=float(event["dur"]),
                grid=tuple(event.get("args", {}).get("grid", ())),
            )
