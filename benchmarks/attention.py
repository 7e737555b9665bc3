"""Microseconds of decode attention and its combination, by launch.

python -m benchmarks.attention                      all cases; writes docs/measurements
python -m benchmarks.attention --store              also the table that the decoder reads
python -m benchmarks.attention --toy --device cpu   whether it runs, in the interpreter

Pages rotate through more memory than the L2 cache holds, launches follow each other in one CUDA
graph and start early, as at decode. Codes are checked against attention in float64; a launch that
fails or gives others has no time.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.attention_case import CASES, TOY, AttentionCase
from benchmarks.attention_operands import FORM, draw_operands
from benchmarks.budget import Budget
from benchmarks.measurement import MEASUREMENTS, write_measurement
from benchmarks.timing import Method, WrongResultError, time_launches
from benchmarks.warming import launch_each, run_ahead, told_of_each
from kernels import attended_tokens as attended
from kernels.attention import Scoring
from kernels.attention_config import (
    ATTENTION_CONFIGS,
    AttentionKey,
    AttentionTable,
    LaunchConfig,
    load_attention_table,
    write_attention_table,
)
from kernels.tables import table_path
from kernels.token_parts import make_slots

__all__ = ["CompileTask", "compile_launches", "main"]

METHOD = Method(replays=20, graph_us=600.0)
TOY_METHOD = Method(rotate_bytes=0, replays=2)
TASK_CONFIGS = 9
"""Launches that one process compiles."""
COMPILE_SHARE = 0.6
"""Of the budget, at most."""
BEST = 5
"""Launches that are printed of a case."""
SHORT = 40
"""Tokens are enough to compile."""
Row = dict[str, Any]
Fields = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileTask:
    """Launches of the cases of one shape, for another process."""

    cases: Sequence[AttentionCase]
    configs: Sequence[LaunchConfig]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, measure, print and write."""
    options = _parser().parse_args(arguments)
    device, console = torch.device(options.device), Console(width=132)
    torch.manual_seed(options.seed)
    budget = Budget(options.budget)
    cases = TOY if options.toy else CASES
    working = _keep_working(cases, options, budget, console)
    rows: list[Row] = []
    for case in cases:
        if not budget.allows("operands", guess_s=3):
            console.print(f"no time for {case.label}", markup=False)
            continue
        found = _measure(case, working[case.key], options, budget, console)
        console.print(_table(case, found))
        rows += found
    write_measurement(options.name, rows, options.out)
    if options.store:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        _store(rows, gpu, options.configs)


def compile_launches(task: CompileTask) -> list[str | None]:
    """Launch once each, in a process of its own: what went wrong, or None for each launch."""
    device = torch.device("cuda")
    cases = [replace(case, context=SHORT) for case in task.cases]
    prepared = [_prepare(case, device, TOY_METHOD)[0] for case in cases]
    return launch_each(task.configs, lambda config: [launch(0, config) for launch in prepared])


def _keep_working(
    cases: Sequence[AttentionCase], options: argparse.Namespace, budget: Budget, console: Console
) -> dict[AttentionKey, list[LaunchConfig]]:
    """Compile all launches in other processes and drop those that failed there."""
    shapes = [tuple(alike) for _, alike in groupby(cases, key=lambda case: case.key)]
    chosen = {shape[0].key: shape[0].configs[: options.most_configs] for shape in shapes}
    if not options.device.startswith("cuda") or not options.workers:
        return chosen
    tasks = [
        CompileTask(cases=shape, configs=chosen[shape[0].key][first : first + TASK_CONFIGS])
        for shape in shapes
        for first in range(0, len(chosen[shape[0].key]), TASK_CONFIGS)
    ]
    seconds = budget.remaining_s() * COMPILE_SHARE
    answers = run_ahead(compile_launches, tasks, workers=options.workers, seconds=seconds)
    working: dict[AttentionKey, list[LaunchConfig]] = {key: [] for key in chosen}
    for task, answer in zip(tasks, answers, strict=True):
        for config, failure in told_of_each(task.configs, answer):
            if failure is None:
                working[task.cases[0].key].append(config)
            else:
                console.print(f"{task.cases[0].label} {config}: {failure}", markup=False)
    return working


def _measure(
    case: AttentionCase,
    configs: Sequence[LaunchConfig],
    options: argparse.Namespace,
    budget: Budget,
    console: Console,
) -> list[Row]:
    """Rows of a case, the fastest first."""
    method = TOY_METHOD if options.toy else METHOD
    with budget.spend("operands"):
        launch, check, copies = _prepare(case, torch.device(options.device), method)
    rows = []
    for config in configs:
        if not budget.allows("launch"):
            break

        def run(index: int, config: LaunchConfig = config) -> Fields:
            return launch(index, config)

        try:
            with budget.spend("launch"):
                timing = time_launches(run, copies, check, method)
        except (WrongResultError, RuntimeError) as error:
            console.print(f"{case.label} {config}: {error}", markup=False)
            continue
        rows.append(_row(case, config, timing.us))
    return sorted(rows, key=lambda row: row["us"])


def _row(case: AttentionCase, config: LaunchConfig, us: float) -> Row:
    recorded = {name: value for name, value in asdict(config).items() if name != "pdl"}
    return {
        "model": case.name, "key": case.key.text, "batch": case.batch, "context": case.context,
        "kv_bits": case.bits, "us": round(us, 3), "roofline_us": round(case.roofline_us, 3),
        "percent": round(100 * case.roofline_us / us, 1), "config": recorded,
    }  # fmt: skip


def _prepare(
    case: AttentionCase, device: torch.device, method: Method
) -> tuple[Callable[[int, LaunchConfig], Fields], Callable[[Fields], bool], int]:
    """A launch of a copy of the pages, whether its output is right, and how many copies."""
    operands = draw_operands(case, device, method)
    slots = make_slots(device)
    scoring = Scoring(softmax_scale=case.head_dim**-0.5)
    early = device.type == "cuda"
    combining = replace(attended.select_config(case.kv_heads * case.group), launch_pdl=early)

    def launch(index: int, config: LaunchConfig) -> Fields:
        written = attended.launch_attended_tokens(
            operands.query, operands.pages, operands.contexts[index], scoring, FORM,
            attention_config=replace(config, pdl=early), config=combining, slots=slots,
        )  # fmt: skip
        return written.codes, written.scale, written.zero_point, written.sums

    return launch, operands.is_right, len(operands.contexts)


def _table(case: AttentionCase, rows: Sequence[Row]) -> Table:
    title = f"{case.label}: {case.moved_bytes / 1e6:.1f} MB, {case.roofline_us:.1f} us of memory"
    table = Table("us", "%", "launch", title=title, min_width=100)
    for row in rows[:BEST]:
        told = (f"{name} {value}" for name, value in row["config"].items())
        table.add_row(f"{row['us']:.2f}", f"{row['percent']:.0f}", " ".join(told))
    return table


def _store(rows: Sequence[Row], gpu: str, folder: Path) -> None:
    """Keep for each shape the launch that is best over all of its cases."""
    table = load_attention_table(gpu, folder)
    source = {"torch": torch.__version__, "triton": triton.__version__, "us": {}}
    entries = dict(table.entries)
    for text in dict.fromkeys(row["key"] for row in rows):
        config, times = _best_of_all([row for row in rows if row["key"] == text])
        entries[AttentionKey.parse(text)] = LaunchConfig(**config)
        source["us"] = {**source["us"], text: times}
    write_attention_table(
        table_path(gpu, folder), AttentionTable(gpu=gpu, entries=entries, source=source)
    )


def _best_of_all(rows: Sequence[Row]) -> tuple[Row, dict[str, float]]:
    """The launch of the least product of times, of those that have one in every case."""
    times: dict[tuple[tuple[str, int], ...], dict[str, float]] = {}
    for row in rows:
        case = f"x{row['batch']} at {row['context']}"
        times.setdefault(tuple(row["config"].items()), {})[case] = row["us"]
    most = max(len(found) for found in times.values())
    whole = {config: found for config, found in times.items() if len(found) == most}
    best = min(whole, key=lambda config: sum(map(math.log, whole[config].values())))
    return dict(best), whole[best]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=120, help="seconds; ends in time")
    parser.add_argument("--toy", action="store_true", help="one tiny case")
    parser.add_argument("--most-configs", type=int, help="launches of a case")
    parser.add_argument(
        "--store", action="store_true", help="write the winners where they are read"
    )
    parser.add_argument("--workers", type=int, default=15, help="compile ahead")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="attention-h100")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    parser.add_argument("--configs", type=Path, default=ATTENTION_CONFIGS)
    return parser


if __name__ == "__main__":
    main()
