"""The demo under several quantizations: what a user of the service gets, and how long it takes.

python -m benchmarks.demo --specs w4a8 w3a8 w5a8
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measurement import MEASUREMENTS, write_measurement


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo once for each quantization, print the table, write the measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--specs", nargs="+", default=["w4a8", "w3a8", "w5a8"])
    parser.add_argument("--home", type=Path, default=Path(".demo"))
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    options = parser.parse_args(arguments)
    rows = [_run_demo(spec, options.home) for spec in options.specs]
    console = Console()
    console.print(_table(rows))
    console.print(str(write_measurement("demo", rows, options.out)))


def _run_demo(spec: str, home: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "api.cli", "demo", "--spec", spec, "--home", str(home)]
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads((home / "report.json").read_text())
    assert report["manifest_ok"], "a benchmark reports only what arrived whole"
    return {"spec": spec, **report}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=rows[0]["model"])
    for name in ("spec", "perplexity fp", "quantized", "bits per weight", "MB", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (
            f"{row['ppl_fp']:.2f}",
            f"{row['ppl_quant']:.2f}",
            f"{row['bits_per_weight']:.4f}",
        )
        table.add_row(row["spec"], *numbers, f"{row['bytes_quant'] / 1e6:.1f}", str(row["seconds"]))
    return table


if __name__ == "__main__":
    main()
