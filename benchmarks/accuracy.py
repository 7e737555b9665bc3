"""Perplexity and counted bits of one model under several quantizations.

python -m benchmarks.accuracy MODEL_DIR --text calibration.txt --eval-text test.txt
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measurement import MEASUREMENTS, write_measurement
from engine.calibration.watch import Watch
from engine.evaluation.plan import EvaluationPlan, EvaluationText
from engine.events import Event, LayerFinished
from engine.pipeline import QuantJob, best_device, quantize_model
from engine.spec import CalibrationSpec, QuantSpec, Recipe

SPECS = ("w8a8", "w5a8", "w4a16", "w4a8", "w4a8kv8", "w4a16g64", "w3a16", "w3a16g64", "w2*a16g64")


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize and measure each case, print the table, write the measurement."""
    options = _parser().parse_args(arguments)
    console = Console()
    rows = []
    for notation in options.specs:
        for recipe in options.recipes:
            rows.append(_measure(options, notation, Recipe(recipe)))
            console.print(rows[-1])
    console.print(_table(rows))
    console.print(str(write_measurement(options.name, rows, options.out)))


def _measure(options: argparse.Namespace, notation: str, recipe: Recipe) -> dict[str, Any]:
    calibration = CalibrationSpec(
        samples=options.samples, length=options.length, epochs=options.epochs, seed=options.seed
    )
    spec = QuantSpec.from_notation(notation, recipe=recipe, calibration=calibration)
    with tempfile.TemporaryDirectory() as folder:
        job = QuantJob(
            source_dir=options.model,
            out_dir=Path(folder) / "out",
            state_dir=Path(folder) / "state",
            spec=spec,
            repo=options.model.name,
            calibration_text=options.text,
            evaluation=EvaluationPlan(
                windows=options.eval_windows, length=options.eval_length, text=options.eval_text
            ),
            device=options.device,
        )
        losses: list[float] = []
        report = quantize_model(job, Watch(on_event=_collect_losses(losses)))
    perplexity = report.evaluation.perplexity
    assert perplexity is not None, "the evaluation of a benchmark must not fail"
    return {
        "model": options.model.name,
        "spec": notation,
        "recipe": recipe.value,
        "samples": calibration.samples,
        "length": calibration.length,
        "epochs": calibration.epochs if recipe is Recipe.LWC else 0,
        "seed": calibration.seed,
        "ppl_fp": round(perplexity.fp, 4),
        "ppl_quant": round(perplexity.quant, 4),
        "eval_tokens": perplexity.tokens,
        "eval_length": options.eval_length,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "promised_bits_per_weight": round(report.promised_bits_per_weight, 4),
        "last_layer_loss": losses[-1],
        "seconds": round(report.seconds, 1),
    }


def _collect_losses(losses: list[float]) -> Any:
    def collect(event: Event, /) -> None:
        if isinstance(event, LayerFinished):
            losses.append(event.loss_after)

    return collect


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{rows[0]['model']}: perplexity, full precision {rows[0]['ppl_fp']}")
    for name in ("spec", "recipe", "perplexity", "bits counted", "bits promised", "seconds"):
        table.add_column(name, justify="left" if name in ("spec", "recipe") else "right")
    for row in rows:
        counted, promised = row["bits_per_weight"], row["promised_bits_per_weight"]
        cells = (f"{row['ppl_quant']:.2f}", f"{counted:.4f}", f"{promised:.4f}", row["seconds"])
        table.add_row(row["spec"], row["recipe"], *map(str, cells))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    defaults = CalibrationSpec()
    parser.add_argument("model", type=Path)
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--recipes", nargs="+", default=[each.value for each in Recipe])
    parser.add_argument("--text", type=Path, default=None, help="calibration text; builtin if none")
    parser.add_argument("--eval-text", type=Path, default=None, help="builtin if none")
    parser.add_argument("--eval-windows", type=int, default=1_000_000)
    parser.add_argument("--eval-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=defaults.samples)
    parser.add_argument("--length", type=int, default=defaults.length)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--name", default="accuracy")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    return parser


if __name__ == "__main__":
    main()
