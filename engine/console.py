"""Events on a terminal: one bar for each stage, one line for each layer."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from engine.events import (
    ArtifactFile,
    BitsChosen,
    EvaluationFailed,
    Event,
    LayerFinished,
    LogLine,
    StageStarted,
)
from engine.events import Progress as Progressed

__all__ = ["EventPainter", "progress_bar"]


def progress_bar(console: Console) -> Progress:
    """Make the bars that `EventPainter` fills."""
    columns = (TextColumn("{task.description:12}"), BarColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeElapsedColumn(), console=console)


class EventPainter:
    """An event sink that draws."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event, /) -> None:
        """Show one event."""
        match event:
            case StageStarted():
                self._task(event.stage)
            case Progressed():
                task = self._task(event.stage)
                self._bar.update(task, total=event.total, completed=event.done)
            case LayerFinished():
                change = f"{event.loss_before:.4g} -> {event.loss_after:.4g}"
                self._bar.console.print(f"{event.name}  {change}  {event.seconds:.1f} s")
            case ArtifactFile():
                self._bar.console.print(f"{event.path}  {event.bytes} bytes")
            case BitsChosen():
                expected = f"expected KL {event.predicted_loss:.4g}"
                self._bar.console.print(f"{event.average_bits:.3f} bits per weight, {expected}")
            case LogLine() | EvaluationFailed():
                self._bar.console.print(event.message)
            case _:
                return

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=None, note="")
        return self._tasks[stage]
