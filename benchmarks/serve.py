"""What callers of the engine see under load: first tokens, tokens between, tokens a second.

python -m benchmarks.serve                         what fits into eight minutes, most telling first
python -m benchmarks.serve --toy --device cpu      whether it runs at all

The engine is the one that serves, in this process; weights are random codes of the real sizes.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.budget import Budget
from benchmarks.kernel_products import release_memory
from benchmarks.measurement import MEASUREMENTS, write_measurement
from benchmarks.serve_case import CASES, GOALS, TOY, ServeCase
from benchmarks.serve_engine import ServedModel, make_served_model
from benchmarks.serve_load import measure_load
from engine.inference.runner_options import RunnerOptions
from engine.spec import QuantSpec

__all__ = ["main", "measure_cases"]

WIDTH = 132
"""Of the table, also where the output is no terminal."""
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the measurement."""
    options = _parser().parse_args(arguments)
    console, budget = Console(width=WIDTH), Budget(options.budget)
    cases = TOY if options.toy else GOALS if options.goals else CASES
    settings = {"launch_pdl": options.pdl, "max_sequences": options.sequences}
    rows: list[Row] = []
    for row in measure_cases(cases, options, budget, console):
        rows.append(row)
        # what was measured stays, whatever ends the run
        write_measurement(options.name, rows, options.out, settings=settings)
    console.print(_table(rows))
    console.print(f"{len(rows)} of {len(cases)} loads within {options.budget:.0f} s")


def measure_cases(
    cases: Sequence[ServeCase], options: argparse.Namespace, budget: Budget, console: Console
) -> Iterator[Row]:
    """Rows in the order of the cases, as many as the budget allows; one model at a time."""
    models = list(dict.fromkeys((each.shape, each.config, each.head_bits) for each in cases))
    for key in models:
        if not budget.allows("model", guess_s=30):
            return
        with budget.spend("model"):
            model = _serve(key, options)
        try:
            mine = [each for each in cases if (each.shape, each.config, each.head_bits) == key]
            for case in mine:
                if not budget.allows("load", guess_s=20):
                    return
                with budget.spend("load"):
                    row = measure_load(case, model)
                row["memory_gb"] = round(model.memory.total_bytes / 1e9, 2)
                row["graph_gb"] = round(model.memory.graph_bytes / 1e9, 3)
                console.print(f"{case.label}: {row['first_token_ms']} ms to the first token")
                yield row
        finally:
            model.engine.close()
            del model
            release_memory(torch.device(options.device))


def _serve(key: tuple[str, str, int | None], options: argparse.Namespace) -> ServedModel:
    shape, config, head_bits = key
    runner = RunnerOptions(
        kv_bits=QuantSpec.from_notation(config).kv_bits, max_sequences=options.sequences
    )
    device = torch.device(options.device)
    return make_served_model(shape, config, head_bits, device, runner, launch_pdl=options.pdl)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="milliseconds that callers see, median and 99th percentile")
    names = ("model", "W A", "kv", "callers", "streams", "prompt", "new", "first", "p99", "goal")
    for name in (*names, "between", "p99", "tok/s"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = (
            row["shape"], row["config"], row["kv_bits"], row["concurrency"], row["streams"],
            row["prompt"], row["new_tokens"], row["first_token_ms"], row["first_token_ms_p99"],
            row["goal_ms"], row["between_tokens_ms"], row["between_tokens_ms_p99"],
            row["tokens_per_s"],
        )  # fmt: skip
        table.add_row(*("-" if each is None else str(each) for each in cells))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds; ends in time")
    parser.add_argument("--goals", action="store_true", help="only what numbers are set for")
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    parser.add_argument("--sequences", type=int, default=64, help="answered at a time")
    parser.add_argument(
        "--no-pdl", dest="pdl", action="store_false", help="no kernel starts before others end"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="serve-h100")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    return parser


if __name__ == "__main__":
    main()
