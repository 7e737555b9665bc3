"""What the demo found out: a table for a person, a JSON file for a program."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from api.cli.output import facts_table
from api.cli.quantities import bytes_text, change_text, duration_text

__all__ = ["DemoReport", "report_table", "write_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What one run of the demo measured."""

    model: str
    w_bits: int
    a_bits: int
    group_size: int
    ppl_fp: float
    ppl_quant: float
    bits_per_weight: float
    """Counted from the tensors of the downloaded files."""
    bytes_fp: int
    bytes_quant: int
    seconds: float
    """From the request to the end of the job."""
    generated_text: str
    manifest_ok: bool


def write_report(report: DemoReport, path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def report_table(report: DemoReport, manifest: dict[str, Any], total_s: float) -> Table:
    """Lay the report out beside what was promised."""
    bits = manifest["bits"]
    promised = f"{bits['promised_per_weight']:.4f}"
    counted = f"{report.bits_per_weight:.4f}"
    group = "per channel" if report.group_size < 0 else f"groups of {report.group_size}"
    perplexity = change_text(report.ppl_fp, report.ppl_quant)
    smaller = f"{report.bytes_fp / report.bytes_quant:.2f} times smaller"
    sizes = f"{bytes_text(report.bytes_fp)} -> {bytes_text(report.bytes_quant)}, {smaller}"
    parts = (
        f"{bytes_text(bits['packed_bytes'])} quantized linears, "
        f"{bytes_text(bits['embedding_bytes'])} embeddings, {bytes_text(bits['other_bytes'])} rest"
    )
    return facts_table(
        {
            "model": report.model,
            "bits": f"W{report.w_bits} A{report.a_bits}, {group}",
            "perplexity": f"{report.ppl_fp:.2f} -> {report.ppl_quant:.2f} ({perplexity})",
            "size": sizes,
            "of that": parts,
            "bits per weight": f"{counted} counted from the stored tensors, {promised} promised",
            "manifest": Text("✓ every sha256 is right", "green"),
            "quantized in": duration_text(report.seconds),
            "all in all": duration_text(total_s),
            "it says": report.generated_text,
        }
    )
