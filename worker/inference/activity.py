"""What a model does at the moment: requests that run and wait, tokens in the last seconds."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

__all__ = ["Activity", "end_of", "statistics_of"]

WINDOW_S = 10


class Activity:
    """Counts of one model. Belongs to the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._seconds: deque[tuple[int, int]] = deque()
        self.running = 0
        self.waiting = 0

    def add_tokens(self, tokens: int) -> None:
        """Count generated tokens."""
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            tokens += self._seconds.pop()[1]
        self._seconds.append((second, tokens))
        self._forget(second)

    @property
    def tokens_per_s(self) -> float:
        """Generated a second, over the last ten or since the start."""
        now = self._clock()
        self._forget(int(now))
        window_s = min(float(WINDOW_S), max(1.0, now - self._started_at))
        return sum(tokens for _, tokens in self._seconds) / window_s

    def _forget(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - WINDOW_S:
            self._seconds.popleft()


def statistics_of(engine: object) -> Any | None:
    """A snapshot of an engine that counts what happens in it, else None."""
    return engine.statistics() if isinstance(engine, _SelfCounting) else None


def end_of(engine: object) -> str | None:
    """Why an engine answers nothing any more; None while it does, or cannot say."""
    return getattr(engine, "end", None)


@runtime_checkable
class _SelfCounting(Protocol):
    def statistics(self) -> Any:
        """A snapshot with `running`, `waiting`, `kv_usage`, `prefix_queries` and so on."""
