"""What every ingredient of a recipe is worth: each one changed alone, all else the same.

python -m benchmarks.ablation --model DIR --eval-text wikitext2-test.txt --configs w4a16,w4a4
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import (
    add_common_options,
    common_case,
    earlier_rows,
    make_schedule,
    read_names,
    read_pairs,
    with_row,
)
from benchmarks.case import RECIPES, Method
from benchmarks.measurement import write_measurement

__all__ = ["VARIANTS", "main"]

CONFIGS = "w4a16,w3a16,w2a16g64,w4a8,w4a4,w2a8g64"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as-it-is": {},
    "rotation": {"rotation": True},
    "no-rotation": {"rotation": False, "online_hadamard": False},
    "online-hadamard": {"online_hadamard": True},
    "no-online-hadamard": {"online_hadamard": False},
    "equivalent-transform": {"equivalent_transform": True},
    "compensation": {"compensation": True},
    "gptq": {"second_order": "gptq"},
    "no-second-order": {"second_order": "none"},
    "nearest": {"rounding": "nearest"},
    "trained-weights": {"rounding": "trained"},
    "own-input-loss": {"own_input_loss": 1.0},
    "cosine-loss": {"cosine_loss": 0.1},
    "attention-loss": {"attention_loss": 0.1},
    "no-end-to-end": {"end_to_end": "none"},
    "end-to-end-weights": {"end_to_end": "weights"},
}
"""One ingredient of the recipe at a time; `as-it-is` changes none."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every variant of every configuration, print the table, write the measurement."""
    options = _parser().parse_args(arguments)
    console = Console()
    cases = [
        replace(common_case(options, config, options.method), ingredients=VARIANTS[name])
        for config, name in _wanted(options)
    ]
    settings = cases[0].settings()
    names = {json.dumps(dict(each)): name for name, each in VARIANTS.items()}
    rows = earlier_rows(options, settings)
    for row in make_schedule(options).run(cases):
        found = {"variant": names[json.dumps(row.get("ingredients", {}))], **row}
        rows = with_row(rows, found, read_names(CONFIGS), "variant", list(VARIANTS))
        # after every row, so that a run that is killed loses nothing
        write_measurement(options.name, rows, options.out, settings=settings)
        console.print(json.dumps(found), markup=False)
    console.print(_table(rows))


def _wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Configuration and variant of every row, the first variants of all configurations first."""
    every = [(config, name) for name in options.variants for config in options.configs]
    return options.rows or every


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="a recipe, and one ingredient of it changed")
    for name in ("config", "variant", "WikiText-2", "second", "KL", "seconds"):
        table.add_column(name, justify="left" if name in ("config", "variant") else "right")
    for row in rows:
        numbers = (
            (row["error"],)
            if "error" in row
            else (
                f"{row['ppl_wikitext2']:.3f}",
                f"{row['ppl_second']:.3f}",
                f"{row['kl_wikitext2']:.4f}",
                f"{row['seconds']:.1f}",
            )
        )
        table.add_row(row["config"], row["variant"], *numbers)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--configs", type=read_names, default=read_names(CONFIGS))
    parser.add_argument(
        "--variants", type=read_names, default=list(VARIANTS), help=", ".join(VARIANTS)
    )
    parser.add_argument(
        "--rows",
        type=read_pairs,
        default=[],
        help="CONFIG:VARIANT,...: these rows alone, in this order",
    )
    parser.add_argument(
        "--method", type=Method, choices=list(RECIPES), default=Method.ABQ, help="of ours"
    )
    add_common_options(parser, name="ablation")
    return parser


if __name__ == "__main__":
    main()
