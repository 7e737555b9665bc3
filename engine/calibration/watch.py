"""The two lines from long work to whoever waits: events out, a wish to stop in."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from engine.errors import CalibrationInterrupted
from engine.events import Event, EventSink, LogLine, Progress, Stage

__all__ = ["BlockStep", "Watch"]

PROGRESS_INTERVAL_S = 0.5
NEVER = float("-inf")


class BlockStep(StrEnum):
    """What the calibration of one block goes through; some steps come twice, some never."""

    LOADING = "loading"
    """From the files to the device, rotated."""
    TEACHING = "teaching"
    """The full-precision chain passes."""
    MEASURING = "measuring"
    """The error of a rounded block."""
    STATISTICS = "statistics"
    """What flows into the linears; clips are placed by it."""
    MOMENTS = "moments"
    """Second-order rounding."""
    TRAINING = "training"
    PASSING = "passing"
    """The quantized chain passes through what was kept."""
    SAVING = "saving"


def _goes_on() -> bool:
    return False


def _hears_nothing(_: BlockStep) -> None:
    """Nobody takes the time."""


@dataclass(slots=True, kw_only=True)
class Watch:
    """Reports events and asks whether to go on."""

    on_event: EventSink
    should_stop: Callable[[], bool] = _goes_on
    on_step: Callable[[BlockStep], None] = _hears_nothing
    """Told when a block enters a step; for whoever takes the time."""
    part: int = 0
    """Which of several equal parts of a stage this one reports on."""
    parts: int = 1
    _reported_at_s: float = field(default=NEVER, init=False)

    def check(self) -> None:
        """Ask; cheap enough for every step.

        Raises:
            CalibrationInterrupted: if the answer is to stop.
        """
        if self.should_stop():
            raise CalibrationInterrupted

    def report(self, event: Event) -> None:
        """Send one event."""
        self.on_event(event)

    def say(self, message: str) -> None:
        """Send one sentence."""
        self.on_event(LogLine(level="info", message=message))

    def progress(self, stage: Stage, done: int, total: int, unit: str) -> None:
        """Report how far a stage is, at most twice a second; the last one always.

        Args:
            stage: the stage.
            done: pieces of this part that are done.
            total: pieces of this part.
            unit: what a piece is.
        """
        now_s = time.monotonic()
        done, total = done + self.part * total, self.parts * total
        if done < total and now_s - self._reported_at_s < PROGRESS_INTERVAL_S:
            return
        self._reported_at_s = now_s
        self.on_event(Progress(stage=stage, done=done, total=total, unit=unit))
