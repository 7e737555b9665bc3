"""The signals that end a command, counted: a second one means at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopSignals", "catch_signals"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """How often the process was asked to end."""

    def __init__(self) -> None:
        self.count = 0
        self._asked = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        """Sleep; true, at once, when the process was asked to end."""
        return self._asked.wait(timeout_s)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Count one signal; this is the handler."""
        self.count += 1
        self._asked.set()


@contextmanager
def catch_signals() -> Iterator[StopSignals]:
    """Count Ctrl-C, SIGTERM and a closed terminal inside the block; only in the main thread."""
    signals = StopSignals()
    before = {number: signal.signal(number, signals.note) for number in ENDING}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
