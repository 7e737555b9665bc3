"""Microseconds of our products beside their rooflines and rivals, all in one run on one GPU.

python -m benchmarks.kernels                       what fits into eight minutes, most telling first
python -m benchmarks.kernels --goals --budget 240  what the project has set itself numbers for
python -m benchmarks.kernels --toy --device cpu    whether it runs at all

A product with a wrong result has no time, and the run ends with an error.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.budget import Budget
from benchmarks.kernel_case import GOALS, TOY, KernelCase, all_cases
from benchmarks.kernel_products import OURS, compile_launch, prepare_product, release_memory
from benchmarks.kernel_rivals import RIVALS, Prepared, cache_key
from benchmarks.measurement import MEASUREMENTS, write_measurement
from benchmarks.timing import Method, WrongResultError, time_launches
from benchmarks.token_products import (
    TOKEN_CASES,
    TOY_TOKEN_CASES,
    TokenCase,
    prepare_tokens,
)
from benchmarks.warming import run_ahead

__all__ = ["Run", "main", "measure_cases"]

CHUNK = 24
"""Products compiled at a time, before they are measured on a quiet GPU."""
JUST_IN_TIME = ("humming", "gemlite")
"""Rivals that compile."""
WIDTH = 132
"""Of the table, also where the output is no terminal."""
TOY_METHOD = Method(rotate_bytes=0, replays=2)
Row = dict[str, Any]
Case = KernelCase | TokenCase


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What all rows share."""

    device: torch.device
    method: Method
    budget: Budget
    rivals: Sequence[str]
    workers: int
    console: Console
    rival_us: dict[tuple[Any, ...], float | None] = field(default_factory=dict)
    """Times already measured: a rival without bit widths answers for many rows."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the measurement."""
    options = _parser().parse_args(arguments)
    run = Run(
        device=torch.device(options.device),
        method=TOY_METHOD if options.toy else Method(),
        budget=Budget(options.budget),
        rivals=options.rivals,
        workers=options.workers if options.device.startswith("cuda") else 0,
        console=Console(width=WIDTH),
    )
    cases = _cases(options)
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    for row in measure_cases(cases, run):
        rows.append(row)
        # what was measured stays, whatever ends the run
        write_measurement(options.name, rows, options.out, settings={"seed": options.seed})
    run.console.print(_table(rows))
    run.console.print(f"{len(rows)} of {len(cases)} products within {options.budget:.0f} s")
    wrong = sum(not row["exact"] for row in rows)
    if wrong:
        sys.exit(f"{wrong} of {len(rows)} products are wrong and have no time")


def _cases(options: argparse.Namespace) -> Sequence[Case]:
    if options.toy:
        return (*TOY, *TOY_TOKEN_CASES)
    others = () if options.goals else all_cases()[len(GOALS) :]
    return (*GOALS, *TOKEN_CASES, *others)


def measure_cases(cases: Sequence[Case], run: Run) -> Iterator[Row]:
    """Rows in the order of the cases, as many as the budget allows."""
    for start in range(0, len(cases), CHUNK):
        chunk = cases[start : start + CHUNK]
        if not run.budget.allows("compilation", guess_s=0):
            return
        with run.budget.spend("compilation"):
            _compile_ahead(chunk, run)
        for case in chunk:
            if not run.budget.allows("product"):
                return
            if isinstance(case, TokenCase):
                yield _measure_tokens(case, run)
            else:
                yield _measure_product(case, run)


def _compile_ahead(cases: Sequence[Case], run: Run) -> None:
    release_memory(run.device)
    rivals = [name for name in JUST_IN_TIME if name in run.rivals]
    tasks = [
        (name, case)
        for case in cases
        for name in (OURS, *(() if isinstance(case, TokenCase) else rivals))
    ]
    answers = run_ahead(
        compile_launch, tasks, workers=run.workers, seconds=run.budget.remaining_s() / 2
    )
    for (name, case), answer in zip(tasks, answers, strict=True):
        if answer:
            run.console.print(f"{name} {case.label}: {answer}", markup=False)


def _measure_product(case: KernelCase, run: Run) -> Row:
    with run.budget.spend("product"):
        op, us = _try_product(case, run)
    rivals = {name: _measure_rival(name, case, run) for name in run.rivals}
    sizes = {"n": case.n, "k": case.k, "m": case.m, "w_bits": case.w_bits}
    row = {
        "op": op, **sizes, "a_bits": case.a_bits, "group_size": case.group_size,
        **_rates(us, case.moved_bytes, case.operations),
        "roofline_us": round(case.roofline_us, 3),
        "cublas_bf16_us": rivals.pop("cublas_bf16", None),
        "rivals": rivals, "exact": us is not None,
    }  # fmt: skip
    run.console.print(f"{op} {case.label}: {us} us, {row['rivals']}", markup=False)
    return row


def _try_product(case: KernelCase, run: Run) -> tuple[str, float | None]:
    try:
        product = prepare_product(case, run.device, run.method)
        return product.op, _time(product, OURS, case, run)
    except Exception as error:  # noqa: BLE001  the row says that it is not exact
        run.console.print(f"{case.label}: {type(error).__name__} {error}", markup=False)
        return "failed", None


def _measure_tokens(case: TokenCase, run: Run) -> Row:
    with run.budget.spend("product"):
        us = _time(prepare_tokens(case, run.device), OURS, case, run)
    run.console.print(f"{case.label}: {us} us", markup=False)
    return {
        "op": case.op.value, "n": None, "k": case.k, "m": case.m, "w_bits": None,
        "a_bits": case.a_bits, "group_size": None, **_rates(us, case.moved_bytes, None),
        "roofline_us": round(case.roofline_us, 3), "cublas_bf16_us": None, "rivals": {},
        "exact": us is not None,
    }  # fmt: skip


def _rates(us: float | None, moved_bytes: int, operations: int | None) -> Row:
    tops = None if us is None or operations is None else round(operations / us / 1e6, 1)
    gbps = None if us is None else round(moved_bytes / us / 1e3, 1)
    return {"us": us, "gbps": gbps, "tops": tops}


def _measure_rival(name: str, case: KernelCase, run: Run) -> float | None:
    key = cache_key(name, case)
    if key not in run.rival_us and run.budget.allows(name, guess_s=2):
        with run.budget.spend(name):
            run.rival_us[key] = _try_rival(name, case, run)
    return run.rival_us.get(key)


def _try_rival(name: str, case: KernelCase, run: Run) -> float | None:
    try:
        prepared = RIVALS[name](case, run.device, run.method)
        return None if prepared is None else _time(prepared, name, case, run)
    except Exception as error:  # noqa: BLE001  a rival that fails must not end our run
        message = str(error).splitlines()[:1]
        run.console.print(f"{name} {case.label}: {type(error).__name__} {message}", markup=False)
        return None


def _time(prepared: Prepared, name: str, case: Case, run: Run) -> float | None:
    try:
        timing = time_launches(prepared.launch, prepared.copies, prepared.check, run.method)
    except WrongResultError as error:
        run.console.print(f"{name} {case.label}: {error}", markup=False)
        return None
    return round(timing.us, 3)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="us of one launch; rivals in the same run")
    names = (
        "kernel",
        "shape",
        "m",
        "W",
        "A",
        "group",
        "us",
        "GB/s",
        "TOPS",
        "% roofline",
        "cuBLAS",
    )
    others = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    for name in (*names, *others):
        table.add_column(name, justify="right")
    for row in rows:
        us = row["us"]
        percent = "wrong" if us is None else f"{100 * row['roofline_us'] / us:.0f}"
        shape = str(row["k"]) if row["n"] is None else f"{row['n']}x{row['k']}"
        cells = (row["op"], shape, row["m"], row["w_bits"], row["a_bits"])
        numbers = (row["group_size"], us, row["gbps"], row["tops"], percent, row["cublas_bf16_us"])
        rivals = [row["rivals"].get(name) for name in others]
        table.add_row(*("-" if each is None else str(each) for each in (*cells, *numbers, *rivals)))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds; ends in time")
    parser.add_argument("--goals", action="store_true", help="only what numbers are set for")
    parser.add_argument("--toy", action="store_true", help="a few tiny products")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--workers", type=int, default=min(10, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="kernels-h100")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    return parser


if __name__ == "__main__":
    main()
