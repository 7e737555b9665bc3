"""Tokens a second of the runtime at real sizes, and where the milliseconds of a step go.

python -m benchmarks.decode                        what fits into eight minutes, most telling first
python -m benchmarks.decode --rival --budget 900   beside transformers, which compiles for long
python -m benchmarks.decode --toy --device cpu     whether it runs at all

Weights are random codes of the real sizes, made on the device. A step is bound by the bytes that it
must read; what is above that is split into linear layers, attention, other kernels and gaps.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.budget import Budget
from benchmarks.decode_case import CASES, GOALS, TOY, DecodeCase, Phase
from benchmarks.decode_measurement import MeasuredModel, make_model, measure_case
from benchmarks.decode_rival import measure_rival
from benchmarks.kernel_products import release_memory
from benchmarks.measurement import MEASUREMENTS, write_measurement

__all__ = ["Run", "main", "measure_cases"]

WIDTH = 150
"""Of the table, also where the output is no terminal."""
RIVAL_GUESS_S = 150.0
CASE_GUESS_S = 20.0
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What all rows share."""

    device: torch.device
    budget: Budget
    console: Console
    launch_pdl: bool
    rival: bool


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the measurement."""
    options = _parser().parse_args(arguments)
    run = Run(
        device=torch.device(options.device),
        budget=Budget(options.budget),
        console=Console(width=WIDTH),
        launch_pdl=options.pdl,
        rival=options.rival,
    )
    cases = TOY if options.toy else GOALS if options.goals else CASES
    settings = {"launch_pdl": options.pdl}
    rows: list[Row] = []
    for row in measure_cases(cases, run):
        rows.append(row)
        # what was measured stays, whatever ends the run
        write_measurement(options.name, rows, options.out, settings=settings)
    run.console.print(_table(rows))
    ours = sum(row["engine"] == "abq" for row in rows)
    run.console.print(f"{ours} of {len(cases)} cases within {options.budget:.0f} s")


def measure_cases(cases: Sequence[DecodeCase], run: Run) -> Iterator[Row]:
    """Rows in the order of the cases, as many as the budget allows; then the rival's."""
    model: MeasuredModel | None = None
    made: tuple[Any, ...] = ()
    for case in cases:
        if not run.budget.allows("case", guess_s=CASE_GUESS_S):
            return
        with run.budget.spend("case"):
            if case.model_key != made or model is None:
                # two models need not fit
                model = None
                release_memory(run.device)
                model, made = _make(case, run), case.model_key
            row = None if model is None else _try(case, model, run)
            release_memory(run.device)
        if row is not None:
            yield row
    model = None
    release_memory(run.device)
    yield from _measure_rivals(cases, run)


def _make(case: DecodeCase, run: Run) -> MeasuredModel | None:
    make = partial(make_model, case, run.device, launch_pdl=run.launch_pdl)
    return _guard(case.label, run, make)


def _try(case: DecodeCase, model: MeasuredModel, run: Run) -> Row | None:
    row = _guard(case.label, run, partial(measure_case, case, model))
    if row is not None:
        run.console.print(f"{case.label}: {row['tokens_per_s']} tok/s", markup=False)
    return row


def _measure_rivals(cases: Sequence[DecodeCase], run: Run) -> Iterator[Row]:
    """One row for each shape that decodes alone."""
    if not run.rival:
        return
    alone = [each for each in cases if each.batch == 1 and each.phase is Phase.DECODE]
    for case in {each.shape: each for each in reversed(alone)}.values():
        if not run.budget.allows("rival", guess_s=RIVAL_GUESS_S):
            return
        with run.budget.spend("rival"):
            row = _guard(f"rival {case.shape}", run, partial(measure_rival, case, run.device))
            release_memory(run.device)
        if row is not None:
            yield row


def _guard(label: str, run: Run, work: Callable[[], T]) -> T | None:
    try:
        return work()
    except Exception as error:  # noqa: BLE001  one case that fails must not end the others
        run.console.print(f"{label}: {type(error).__name__} {error}", markup=False)
        return None


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="milliseconds of a step; bound = bytes to read / memory rate")
    names = ("by", "phase", "shape", "bits", "kv", "head", "batch", "at", "tok/s", "goal", "ms")
    for name in (*names, "bound", "linear", "attend", "other", "gaps", "GB"):
        table.add_column(name, justify="right")
    for row in rows:
        split = row["split"] or {}
        parts = [split.get(f"{part}_ms") for part in ("linear", "attention", "other", "gaps")]
        cells = (
            row["engine"].split()[0], row["phase"], row["shape"], row["config"], row["kv_bits"],
            row["head_bits"], row["batch"], row["context"], row["tokens_per_s"], row["goal"],
            row["ms_per_step"], row["bound_ms"], *parts, row["weight_gb"],
        )  # fmt: skip
        table.add_row(*(_cell(each) for each in cells))
    return table


def _cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
    return "-" if value is None else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds; ends in time")
    parser.add_argument("--goals", action="store_true", help="only what numbers are set for")
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    parser.add_argument("--rival", action="store_true", help="transformers too, in bfloat16")
    parser.add_argument(
        "--no-pdl", dest="pdl", action="store_false", help="no kernel starts before others end"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="decode-h100")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    return parser


if __name__ == "__main__":
    main()
