"""A running job as a live picture: stage, a bar, and the latest layers with their losses."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from api.cli.events import JobEvent
from api.cli.output import list_table, status_text
from api.cli.quantities import (
    bits_text,
    bytes_text,
    change_text,
    divergence_text,
    duration_text,
    loss_text,
)

__all__ = ["JobPicture", "LayerRow", "event_line"]

LAYERS_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """What one decoder layer lost, before and after training."""

    index: int
    total: int
    loss_before: float
    loss_after: float
    seconds: float
    memory_bytes: int
    resumed: bool

    @classmethod
    def from_event(cls, data: dict[str, Any]) -> "LayerRow":
        """Read a `layer.finished` event."""
        return cls(**{name: data[name] for name in cls.__slots__})


@dataclass(slots=True)
class JobPicture:
    """Takes events one by one and can be drawn at any time."""

    title: str
    status: str = "queued"
    stage: str = ""
    layer: str = ""
    remark: str = ""
    layers: deque[LayerRow] = field(default_factory=lambda: deque(maxlen=LAYERS_SHOWN))
    _is_counted: bool = False
    _bar: Progress = field(init=False)
    _task: TaskID = field(init=False)

    def __post_init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=36),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
        )
        self._task = self._bar.add_task("waiting for a worker", total=None, count="")

    def apply(self, event: JobEvent) -> None:
        """Take one event in."""
        self.remark = ""
        data = event.data
        match event.type:
            case "stage.started":
                self.stage, self.layer, self._is_counted = str(data["stage"]), "", False
                self._bar.reset(self._task, description=self.stage, total=None, count="")
            case "layer.started":
                self._show_layer(data["index"], data)
            case "layer.finished":
                self.layers.append(LayerRow.from_event(data))
                self._show_layer(data["index"] + 1, data)
            case "download.progress":
                done, total = data["bytes"], data["total"]
                self._advance(done, total, f"{bytes_text(done)} of {bytes_text(total)}")
            case "progress":
                self._is_counted = True
                counted = f"{data['unit']} {data['done']} of {data['total']}"
                self._advance(data["done"], data["total"], self.layer or counted)
            case "log" | "publish.failed":
                self.remark = str(data["message"])
            case "bits.chosen":
                self.remark = _chosen_text(data)
            case _:
                self._turn(event)

    def _show_layer(self, done: int, data: dict[str, Any]) -> None:
        self.layer = f"layer {data['index'] + 1} of {data['total']}"
        if self._is_counted:
            # steps are the finer measure; the layer is only named
            self._bar.update(self._task, count=self.layer)
        else:
            self._advance(done, data["total"], self.layer)

    def _advance(self, done: float, total: float, count: str) -> None:
        self._bar.update(self._task, completed=done, total=total, count=count)

    def _turn(self, event: JobEvent) -> None:
        """A status changed; a requeued job waits again. Other events change nothing here."""
        if not event.type.startswith("job."):
            return
        turned = {"started": "running", "requeued": "queued"}
        name = event.type.removeprefix("job.")
        self.status = turned.get(name, name)
        if name in ("queued", "requeued"):
            self._bar.reset(self._task, description="waiting for a worker", total=None, count="")

    def __rich__(self) -> Group:
        head = Text.assemble((self.title, "bold"), "  ", status_text(self.status))
        parts: list[Any] = [head, self._bar]
        if self.layers:
            parts.append(_layers_table(self.layers))
        if self.remark:
            parts.append(Text(self.remark, style="dim italic"))
        return Group(*parts)


def _layers_table(layers: deque[LayerRow]) -> Table:
    rows = [
        (
            f"{row.index + 1}/{row.total}",
            loss_text(row.loss_before),
            loss_text(row.loss_after),
            change_text(row.loss_before, row.loss_after),
            "from checkpoint" if row.resumed else duration_text(row.seconds),
            bytes_text(row.memory_bytes),
        )
        for row in layers
    ]
    columns = (">layer", ">loss, rounded", ">loss, trained", ">change", ">time", ">memory")
    return list_table(columns, rows)


def event_line(event: JobEvent) -> str | None:
    """Say the event in one line, for a log or a pipe; None for what only a bar can show."""
    data = event.data
    match event.type:
        case "stage.started":
            kind, said = "stage", str(data["stage"])
        case "bits.chosen":
            kind, said = "bits", _chosen_text(data)
        case "layer.finished":
            kind, said = "layer", _layer_text(LayerRow.from_event(data))
        case "eval.result" | "eval.divergence":
            kind, said = "evaluation", _measured_text(event)
        case "eval.failed" | "publish.failed" | "log":
            kind, said = "remark", str(data["message"])
        case "job.failed":
            kind, said = "failed", str((data.get("error") or data).get("message", ""))
        case _ if event.type.startswith("job."):
            kind, said = "job", event.type.removeprefix("job.")
        case _:
            return None
    return f"{kind:<11}{said}"


def _chosen_text(data: dict[str, Any]) -> str:
    return bits_text(data["average_bits"], data["predicted_loss"], data["bits"])


def _measured_text(event: JobEvent) -> str:
    data = event.data
    if event.type == "eval.divergence":
        said = divergence_text(data)
    else:
        said = f"{data['metric']} {data['fp']:.3f} -> {data['quant']:.3f}"
    return " ".join([said, *_on(data.get("dataset"))])


def _on(dataset: str | None) -> list[str]:
    # an event of an earlier engine names no text
    return [f"on {dataset}"] if dataset else []


def _layer_text(row: LayerRow) -> str:
    losses = f"loss {loss_text(row.loss_before)} -> {loss_text(row.loss_after)}"
    origin = "from checkpoint" if row.resumed else duration_text(row.seconds)
    return f"{row.index + 1}/{row.total}  {losses}  {origin}"
