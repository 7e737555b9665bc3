"""Our recipes and their peers on one model, data, seed and stored bits, in one run.

python -m benchmarks.accuracy --model DIR --eval-text wikitext2-test.txt \
    --configs w4a16,w2a16g64 --methods rtn,abq-fast,abq,omniquant,autoround,gptq
"""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.case import Case, Method
from benchmarks.measurement import MEASUREMENTS, write_measurement
from benchmarks.schedule import Schedule
from engine.pipeline import best_device
from engine.spec import CalibrationSpec, QuantSpec

__all__ = [
    "add_common_options",
    "common_case",
    "earlier_rows",
    "main",
    "make_schedule",
    "read_names",
    "read_pairs",
    "with_row",
]

CONFIGS = "w4a16,w4a16g64,w3a16g64,w2a16g64,w4a8,w6a6,w4a4,w2a8g64"
METHODS = "rtn,abq-fast,abq,omniquant,autoround,gptq"
WHOLE_TEXT = 1_000_000
Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every configuration by every method, print the table, write the measurement."""
    options = _parser().parse_args(arguments)
    console = Console()
    wanted = options.rows or [(c, m) for c in options.configs for m in options.methods]
    cases = [common_case(options, config, method) for config, method in wanted]
    settings = cases[0].settings()
    rows = earlier_rows(options, settings)
    for row in make_schedule(options).run(cases):
        rows = with_row(rows, row, read_names(CONFIGS), "method", list(Method))
        # after every row, so that a run that is killed loses nothing
        path = write_measurement(options.name, rows, options.out, settings=settings)
        console.print(f"{len(rows)} rows in {path}: {json.dumps(row)}", markup=False)
    console.print(_table(options.model.name, rows))


def make_schedule(options: argparse.Namespace) -> Schedule:
    """Spread rows as the common options say."""
    return Schedule(
        jobs=options.jobs or max(1, len(options.devices)),
        gpus=options.devices,
        timeout_s=options.timeout,
        log_dir=options.logs,
    )


def common_case(options: argparse.Namespace, config: str, method: Method) -> Case:
    """Make the case of one row from what all rows of a run have in common."""
    QuantSpec.from_notation(config)  # a typing error shows at once, not after an hour
    return Case(
        config=config,
        method=method,
        model=options.model.resolve(),
        text=_absolute(options.text),
        eval_text=options.eval_text.resolve(),
        second_text=_absolute(options.second_text),
        samples=options.samples,
        length=options.length,
        epochs=options.epochs,
        seed=options.seed,
        eval_windows=options.eval_windows,
        eval_length=options.eval_length,
        peer_steps=options.peer_steps,
        device=options.device,
    )


def earlier_rows(options: argparse.Namespace, settings: Row) -> list[Row]:
    """Rows of the file, with their commit and GPU; none unless the run is told to append.

    Raises:
        SystemExit: if the file was measured with other settings.
    """
    path = options.out / f"{options.name}.json"
    if not options.append or not path.is_file():
        return []
    record = json.loads(path.read_bytes())
    if record.get("settings") != settings:
        raise SystemExit(f"{path} was measured with {record.get('settings')}, not {settings}")
    # the file will name commit and machine of this run; what is kept says where it came from
    origin = {"commit": record["commit"], "gpu": record["hardware"].get("gpu")}
    return [{**row, **origin, **_named(row, origin)} for row in record["rows"]]


def _named(row: Row, names: Collection[str]) -> Row:
    return {name: value for name, value in row.items() if name in names}


def with_row(
    rows: Sequence[Row], row: Row, configs: Sequence[str], column: str, names: Sequence[str]
) -> list[Row]:
    """Add a row in the place of an earlier one; a row that was not measured anew stays.

    Sorted by configuration, those not named last, and by the place of a column among names.
    """
    others = [
        each for each in rows if (each["config"], each[column]) != (row["config"], row[column])
    ]
    known = [*configs, *sorted({each["config"] for each in (*others, row)} - set(configs))]
    return sorted(
        (*others, row), key=lambda each: (known.index(each["config"]), names.index(each[column]))
    )


def _table(model: str, rows: Sequence[Row]) -> Table:
    full = next((row["ppl_fp_wikitext2"] for row in rows if "error" not in row), None)
    table = Table(title=f"{model}: perplexity, full precision {full} on WikiText-2")
    for name in ("config", "method", "WikiText-2", "second", "KL", "bits", "seconds"):
        table.add_column(name, justify="left" if name in ("config", "method") else "right")
    for row in rows:
        table.add_row(row["config"], row["method"], *_cells(row))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    if "error" in row:
        return (row["error"],)
    return (
        f"{row['ppl_wikitext2']:.3f}",
        f"{row['ppl_second']:.3f}",
        f"{row['kl_wikitext2']:.4f}",
        f"{row['bits_per_weight']:.4f}",
        f"{row['seconds']:.1f}",
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()


def read_names(text: str) -> list[str]:
    """Read names between commas."""
    return [each for each in text.split(",") if each]


def read_pairs(text: str) -> list[tuple[str, str]]:
    """Read ``CONFIG:NAME`` between commas."""
    pairs = [each.partition(":") for each in read_names(text)]
    return [(config, name) for config, _, name in pairs]


def _rows(text: str) -> list[tuple[str, Method]]:
    return [(config, Method(method)) for config, method in read_pairs(text)]


def _methods(text: str) -> list[Method]:
    return [Method(each) for each in read_names(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--configs", type=read_names, default=read_names(CONFIGS))
    parser.add_argument(
        "--methods", type=_methods, default=_methods(METHODS), help=", ".join(Method)
    )
    parser.add_argument(
        "--rows", type=_rows, default=[], help="CONFIG:METHOD,...: these rows alone, in this order"
    )
    add_common_options(parser, name="accuracy")
    return parser


def add_common_options(parser: argparse.ArgumentParser, *, name: str) -> None:
    """Add what every benchmark of one model's quality is told; the file is `<name>.json`."""
    defaults = CalibrationSpec()
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--text", type=Path, default=None, help="calibration text; builtin if none")
    parser.add_argument("--eval-text", type=Path, required=True, help="WikiText-2 test, one text")
    parser.add_argument("--second-text", type=Path, default=None, help="builtin if none")
    parser.add_argument("--eval-windows", type=int, default=WHOLE_TEXT, help="of each text")
    parser.add_argument("--eval-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=defaults.samples)
    parser.add_argument("--length", type=int, default=defaults.length)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--peer-steps", type=int, default=None, help="a block; the peer's default")
    parser.add_argument("--device", default=best_device())
    parser.add_argument(
        "--devices", type=read_names, default=[], help="GPU indices, one row on each"
    )
    parser.add_argument("--jobs", type=int, default=0, help="rows at a time; one a GPU if 0")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a row may take")
    parser.add_argument("--logs", type=Path, default=None, help="keep the output of every row here")
    parser.add_argument("--append", action="store_true", help="keep the file's other rows")
    parser.add_argument("--name", default=name)
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)


if __name__ == "__main__":
    main()
