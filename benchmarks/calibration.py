"""Seconds and peak memory of one decoder layer's calibration, at the sizes of published models.

python -m benchmarks.calibration --shape llama-7b --device cuda

The real loop runs by a real recipe over a few layers of random weights and random tokens; the whole
model is the mean of the layers after the first (which compiles kernels) times their number. Tuning
end to end runs once for a model and not for a layer, so it is left out, and losses say nothing.
"""

import argparse
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measurement import MEASUREMENTS, write_measurement
from benchmarks.shapes import SHAPES, VOCABULARY, layers_of, write_source
from engine.calibration.block import BlockShape
from engine.calibration.block_loop import BlockLoop
from engine.calibration.placement import ChainMemory
from engine.calibration.resume import BlockStore
from engine.calibration.watch import BlockStep, Watch
from engine.events import Event, LayerFinished
from engine.fit import check_spec
from engine.models.loading import SourceModel
from engine.models.rotated import rotated
from engine.pipeline import best_device
from engine.recipe import EndToEnd, Ingredients
from engine.rotation import Rotation, online_blocks
from engine.spec import CalibrationSpec, QuantSpec, Recipe

__all__ = ["main"]


class StepClock:
    """Takes the time of every step of a block, and the peak of the device's memory."""

    def __init__(self, device: torch.device) -> None:
        self.blocks: list[dict[str, Any]] = []
        """One entry a finished block."""
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._step: BlockStep | None = None
        self._since_s = 0.0

    def enter(self, step: BlockStep) -> None:
        """End one step and start another."""
        self._stop()
        if step is BlockStep.LOADING and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._step, self._since_s = step, time.perf_counter()

    def hear(self, event: Event) -> None:
        """Close a block when it is reported."""
        if not isinstance(event, LayerFinished):
            return
        self._stop()
        on_gpu = self._device.type == "cuda"
        self.blocks.append({
            "seconds": round(sum(self._seconds.values()), 3),
            "steps": {name: round(each, 3) for name, each in self._seconds.items()},
            "peak_device_bytes": torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            # what a recorded graph keeps to itself is in this one alone
            "reserved_device_bytes": torch.cuda.memory_reserved(self._device) if on_gpu else None,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        })  # fmt: skip
        self._seconds, self._step = defaultdict(float), None

    def _stop(self) -> None:
        if self._device.type == "cuda":
            # launches return at once; the work counts where it was asked for
            torch.cuda.synchronize(self._device)
        if self._step is not None:
            self._seconds[self._step.value] += time.perf_counter() - self._since_s


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every shape, print the table, write the measurement."""
    options = _parser().parse_args(arguments)
    rows, console = [], Console()
    for shape in options.shape:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            rows.append(_measure(shape, options, Path(folder)))
        # after every row, so that a run that is killed loses nothing
        path = write_measurement(options.name, rows, options.out, settings=_settings(options))
        console.print(_table(rows))
        console.print(str(path))


def _measure(shape: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source_dir = folder / "source"
    source_dir.mkdir()
    source = SourceModel.open(write_source(shape, options.blocks, source_dir))
    spec, clock = _spec(options), StepClock(torch.device(options.device))
    check_spec(source.architecture, spec)
    loop = _loop(source, spec, options, folder / "state", clock)
    calibrated = loop.run(_random_tokens(spec.calibration))
    # the first block compiles
    timed = clock.blocks[1:] or clock.blocks
    block_s = sum(each["seconds"] for each in timed) / len(timed)
    peaks = {
        name: max((each[name] for each in clock.blocks if each[name] is not None), default=None)
        for name in ("peak_device_bytes", "reserved_device_bytes", "peak_host_bytes")
    }
    steps = {
        name: round(sum(each["steps"].get(name, 0) for each in timed) / len(timed), 3)
        for name in clock.blocks[-1]["steps"]
    }
    return {
        "shape": shape,
        "spec": spec.notation,
        "recipe": spec.recipe.value,
        "samples": spec.calibration.samples,
        "length": spec.calibration.length,
        "epochs": spec.calibration.epochs,
        "device": options.device,
        "placement": calibrated.placement.place.value,
        "blocks_measured": len(clock.blocks),
        "blocks": layers_of(shape),
        "first_block_seconds": clock.blocks[0]["seconds"],
        "block_seconds": round(block_s, 3),
        "step_seconds": steps,
        **peaks,
        "hours_for_all_blocks": round(block_s * layers_of(shape) / 3600, 4),
    }


def _loop(
    source: SourceModel,
    spec: QuantSpec,
    options: argparse.Namespace,
    state_dir: Path,
    clock: StepClock,
) -> BlockLoop:
    rotation, device = Rotation.of(spec, source.architecture), torch.device(options.device)
    return BlockLoop(
        model=rotated(replace(source, block_device=device), rotation),
        spec=spec,
        store=BlockStore.open(state_dir, "benchmark"),
        watch=Watch(on_event=clock.hear, on_step=clock.enter),
        device=device,
        shape=BlockShape.of(source.architecture, online_blocks(source.architecture, rotation)),
        memory=ChainMemory(
            device_bytes=options.chain_device_bytes, host_bytes=options.chain_host_bytes
        ),
    )


def _spec(options: argparse.Namespace) -> QuantSpec:
    calibration = CalibrationSpec(
        samples=options.samples,
        length=options.length,
        epochs=options.epochs,
        batch=options.batch,
        seed=options.seed,
    )
    return QuantSpec.from_notation(
        options.spec,
        recipe=options.recipe,
        ingredients=Ingredients(end_to_end=EndToEnd.NONE),
        calibration=calibration,
    )


def _random_tokens(calibration: CalibrationSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(calibration.seed)
    size = (calibration.samples, calibration.length)
    return torch.randint(0, VOCABULARY, size, generator=generator)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "weights": "random, normal",
        "vocabulary": VOCABULARY,
        "end_to_end": EndToEnd.NONE.value,
        "batch": options.batch,
        "seed": options.seed,
        "chain_device_bytes": options.chain_device_bytes,
        "chain_host_bytes": options.chain_host_bytes,
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="calibration of one decoder layer")
    for name in ("shape", "spec", "recipe", "chains on"):
        table.add_column(name)
    for name in ("s a layer", "GB device", "GB host", "layers", "hours"):
        table.add_column(name, justify="right")
    for row in rows:
        device = row["peak_device_bytes"]
        table.add_row(
            row["shape"],
            row["spec"],
            row["recipe"],
            row["placement"],
            f"{row['block_seconds']:.2f}",
            "" if device is None else f"{device / 1e9:.2f}",
            f"{row['peak_host_bytes'] / 1e9:.2f}",
            str(row["blocks"]),
            f"{row['hours_for_all_blocks']:.3f}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    defaults = CalibrationSpec()
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["llama-7b"])
    parser.add_argument("--spec", default="w4a16g128")
    parser.add_argument("--recipe", type=Recipe, choices=list(Recipe), default=Recipe.DEFAULT)
    for name in ("samples", "length", "epochs", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--blocks", type=int, default=3, help="layers that are measured")
    parser.add_argument("--device", default=best_device())
    for place in ("device", "host"):
        parser.add_argument(f"--chain-{place}-bytes", type=int, help="for hidden states")
    parser.add_argument("--work", type=Path, default=None, help="takes the weights; temporary")
    parser.add_argument("--name", default="calibration")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    return parser


if __name__ == "__main__":
    main()
