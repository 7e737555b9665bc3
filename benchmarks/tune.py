"""Time the launches that each kernel proposes and keep the fastest of every shape in the table.

python -m benchmarks.tune --budget 560                      most telling shapes first
python -m benchmarks.tune --widths 2 4 --tokens 1 --again   those alone, measured anew
python -m benchmarks.tune --toy --device cpu                whether it runs, in the interpreter

What the table has is not measured again, so a run that ended in time is taken up by the next one.
A launch that fails or computes something else is no candidate.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from rich.console import Console

from benchmarks.budget import Budget
from benchmarks.kernel_candidates import candidate_plans
from benchmarks.kernel_case import GOALS, SERVED, TOY, KernelCase, all_cases
from benchmarks.kernel_operands import draw_operands
from benchmarks.kernel_products import (
    PlanTask,
    compile_plans,
    plan_product,
    release_memory,
    rotate_operands,
)
from benchmarks.timing import Method, WrongResultError, time_launches
from benchmarks.warming import run_ahead, told_of_each
from kernels.linear import Plan
from kernels.tables import CONFIGS, ConfigTable, TableEntry, read_table, table_path, write_table

__all__ = ["Tuning", "main", "tune_cases"]

CHUNK = 6
"""Shapes compiled at a time, before they are measured on a quiet GPU."""
PLANS_A_TASK = 6
METHOD = Method(replays=20, graph_us=800)
TOY_METHOD = Method(rotate_bytes=0, replays=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What all shapes share."""

    device: torch.device
    method: Method
    budget: Budget
    workers: int
    console: Console
    most_plans: int | None
    """Candidates of a shape at most."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, and write the table after every shape."""
    options = _parser().parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    gpu = torch.cuda.get_device_name(options.device) if on_gpu else "interpreter"
    path = table_path(gpu, options.out)
    table = read_table(path) if path.exists() else ConfigTable(gpu=gpu, entries={})
    tuning = Tuning(
        device=torch.device(options.device),
        method=TOY_METHOD if options.toy else METHOD,
        budget=Budget(options.budget),
        workers=options.workers if on_gpu else 0,
        console=Console(),
        most_plans=options.most_plans,
    )
    torch.manual_seed(options.seed)
    cases = [case for case in _cases(options) if options.again or case.key not in table.entries]
    for entry in tune_cases(cases, tuning):
        entries = {**table.entries, entry.key: entry}
        table = replace(table, entries=entries, source=_source())
        write_table(path, table)
    left = sum(case.key not in table.entries for case in cases)
    tuning.console.print(f"{path}: {len(table.entries)} entries, {left} shapes left")


def tune_cases(cases: Sequence[KernelCase], tuning: Tuning) -> Iterator[TableEntry]:
    """Entries in the order of the cases, as many as the budget allows."""
    for start in range(0, len(cases), CHUNK):
        chunk = cases[start : start + CHUNK]
        if not tuning.budget.allows("compilation", guess_s=0):
            return
        with tuning.budget.spend("compilation"):
            interpreted = tuning.device.type == "cpu"
            plans = [
                candidate_plans(case, interpreted=interpreted)[: tuning.most_plans]
                for case in chunk
            ]
            working = _keep_working(chunk, plans, tuning)
        for case, candidates in zip(chunk, working, strict=True):
            if not tuning.budget.allows("shape"):
                return
            with tuning.budget.spend("shape"):
                entry = _tune_case(case, candidates, tuning)
            if entry is not None:
                yield entry


def _keep_working(
    cases: Sequence[KernelCase], plans: Sequence[Sequence[Plan]], tuning: Tuning
) -> list[list[Plan]]:
    """Compile all plans in other processes and drop those that failed there."""
    if not tuning.workers:
        return [list(each) for each in plans]
    release_memory(tuning.device)
    tasks = [
        PlanTask(case=case, plans=each[start : start + PLANS_A_TASK])
        for case, each in zip(cases, plans, strict=True)
        for start in range(0, len(each), PLANS_A_TASK)
    ]
    seconds = tuning.budget.remaining_s() * 0.7
    answers = run_ahead(compile_plans, tasks, workers=tuning.workers, seconds=seconds)
    working: dict[KernelCase, list[Plan]] = {case: [] for case in cases}
    for task, answer in zip(tasks, answers, strict=True):
        for plan, failure in told_of_each(task.plans, answer):
            if failure is None:
                working[task.case].append(plan)
            else:
                tuning.console.print(f"{task.case.label} {plan}: {failure}", markup=False)
    return [working[case] for case in cases]


def _tune_case(case: KernelCase, plans: Sequence[Plan], tuning: Tuning) -> TableEntry | None:
    rotation = rotate_operands(draw_operands(case, tuning.device), tuning.method)
    best: TableEntry | None = None
    for plan in plans:
        try:
            product = plan_product(rotation, plan)
            timing = time_launches(product.launch, product.copies, product.check, tuning.method)
        except (WrongResultError, RuntimeError, ValueError) as error:
            tuning.console.print(f"{case.label} {plan}: {error}", markup=False)
            continue
        if best is None or timing.us < best.us:
            us, config = round(timing.us, 3), asdict(plan.config)
            best = TableEntry(key=case.key, route=plan.route, us=us, config=config)
    tuning.console.print(f"{case.label}: {_describe(best, case)}, {len(plans)} tried", markup=False)
    return best


def _describe(best: TableEntry | None, case: KernelCase) -> str:
    if best is None:
        return "nothing works"
    percent = 100 * case.roofline_us / best.us
    return f"{best.us} us = {percent:.0f} % of the roofline, {best.route} {dict(best.config)}"


def _source() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton.__version__}


def _cases(options: argparse.Namespace) -> list[KernelCase]:
    cases = TOY if options.toy else GOALS if options.goals else all_cases()
    cases = SERVED if options.served else cases
    return [
        case
        for case in cases
        # how tokens are cut is part of what is tuned
        if not case.cut
        and (not options.widths or case.w_bits in options.widths)
        and (not options.tokens or case.m in options.tokens)
        and (not options.inputs or case.a_bits in options.inputs)
        and (not options.groups or case.group_size in options.groups)
        and (not options.shapes or f"{case.n}x{case.k}" in options.shapes)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds; ends in time")
    parser.add_argument("--goals", action="store_true", help="only what numbers are set for")
    parser.add_argument("--served", action="store_true", help="only what the runtime multiplies")
    parser.add_argument("--toy", action="store_true", help="a few tiny products")
    parser.add_argument("--widths", type=int, nargs="*", help="weight bits")
    parser.add_argument("--inputs", type=int, nargs="*", help="bits of activations")
    parser.add_argument("--tokens", type=int, nargs="*", help="M")
    parser.add_argument("--shapes", nargs="*", help="N x K: 4096x4096")
    parser.add_argument("--groups", type=int, nargs="*", help="columns a scale; -1 is a row")
    parser.add_argument("--again", action="store_true", help="measure also what the table has")
    parser.add_argument("--most-plans", type=int, help="candidates of a shape, best guess first")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=CONFIGS)
    return parser


if __name__ == "__main__":
    main()
