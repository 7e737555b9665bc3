"""Seconds that a run may take, and whether the next piece of work still fits."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Budget"]


class Budget:
    """Starts when it is made; remembers what each kind of work has cost."""

    def __init__(
        self, seconds: float, *, clock: Callable[[], float] = time.monotonic, reserve: float = 5.0
    ):
        """Begin.

        Args:
            seconds: that the run may take.
            clock: seconds that never go back.
            reserve: seconds kept for writing the results.
        """
        self._clock = clock
        self._end = clock() + seconds - reserve
        self._costs: dict[str, float] = {}

    def remaining_s(self) -> float:
        """Seconds left, 0 at the end."""
        return max(0.0, self._end - self._clock())

    def allows(self, kind: str, guess_s: float = 1.0) -> bool:
        """Whether work of a kind fits, by the dearest of its kind so far, else by a guess."""
        remaining = self.remaining_s()
        return remaining > 0 and self._costs.get(kind, guess_s) <= remaining

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Do a piece of work of a kind, and remember what it took, also where it fails."""
        started = self._clock()
        try:
            yield
        finally:
            self._costs[kind] = max(self._costs.get(kind, 0.0), self._clock() - started)
