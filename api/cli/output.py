"""How commands speak: results on stdout, as tables or JSON; progress and remarks on stderr."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["facts_table", "list_table", "print_json", "print_table", "remark", "status_text"]

STATUS_STYLE = {
    "queued": "yellow",
    "running": "cyan",
    "cancelling": "magenta",
    "cancelled": "dim",
    "succeeded": "green",
    "failed": "bold red",
    "loading": "cyan",
    "ready": "green",
}
STATUS_MARK = {"succeeded": "✓", "ready": "✓", "failed": "✗", "running": "▸", "loading": "▸"}


def print_json(record: Any, *, indent: int | None = 2) -> None:
    """Write one JSON value to stdout, for another program."""
    sys.stdout.write(json.dumps(record, indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(table: Table) -> None:
    """Write a table to stdout, for a person."""
    Console().print(table)


def remark(message: str, style: str = "") -> None:
    """Say something beside the result, on stderr."""
    Console(stderr=True, highlight=False).print(Text(message, style=style), soft_wrap=True)


def list_table(columns: Iterable[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Lay out a list.

    A column whose name starts with `>` holds numbers and is aligned right; one that starts with
    `~` gives way where the terminal is narrow. All others are shown whole: an id that is cut off
    is of no use.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    cells = list(rows)
    for index, name in enumerate(columns):
        gives_way, label = name.startswith("~"), name.lstrip(">~")
        table.add_column(
            label,
            justify="right" if name.startswith(">") else "left",
            no_wrap=not gives_way,
            overflow="ellipsis",
            min_width=4 if gives_way else max(map(len, [label, *(row[index] for row in cells)])),
        )
    for row in cells:
        table.add_row(*row)
    return table


def facts_table(facts: Mapping[str, str | Text], title: str | None = None) -> Table:
    """Lay out one thing as names and values; empty values are left out."""
    table = Table(
        box=box.SIMPLE, show_header=False, pad_edge=False, title=title, title_justify="left"
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, value)
    return table


def status_text(status: str) -> Text:
    """A status that differs by mark and word as well as by colour."""
    return Text(f"{STATUS_MARK.get(status, '·')} {status}", style=STATUS_STYLE.get(status, ""))
