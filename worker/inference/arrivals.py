"""Chunks on their way from threads to the event loop, all that came meanwhile at once.

Under load a reader that is busy with one batch finds the next one larger: the loop is woken once
a batch and not once a token.
"""

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.errors import EngineError
from engine.inference.request import GenerationChunk

__all__ = ["Arrival", "Arrivals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A chunk, or what ended its generation instead."""

    prompt: int
    """Which prompt of the request, from 0."""
    item: GenerationChunk | BaseException
    moment: float
    """`time.perf_counter()` in the engine's thread."""


class Arrivals:
    """Collects from any threads for one task of the loop it is made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._items: list[Arrival] = []
        self._has_news = asyncio.Event()

    def put(self, prompt: int, item: GenerationChunk | BaseException) -> None:
        """Add an item; from any thread."""
        arrival = Arrival(prompt=prompt, item=item, moment=time.perf_counter())
        with self._lock:
            self._items.append(arrival)
            is_first = len(self._items) == 1
        if is_first:
            try:
                self._loop.call_soon_threadsafe(self._has_news.set)
            except RuntimeError:
                # the loop is closed: the process stops and nobody reads any more
                return

    async def take(self) -> list[Arrival]:
        """Wait for items and take all that are there."""
        await self._has_news.wait()
        self._has_news.clear()
        with self._lock:
            taken, self._items = self._items, []
        return taken

    def deliver_to(self, prompt: int) -> Callable[[GenerationChunk | EngineError], None]:
        """What an engine calls with the chunks of one prompt."""
        return lambda item: self.put(prompt, item)

    async def pull(self, prompt: int, chunks: Iterator[GenerationChunk]) -> None:
        """Read an iterator in a thread; it ends by itself once the request is cancelled."""
        context = contextvars.copy_context()
        await self._loop.run_in_executor(None, context.run, self._read, prompt, chunks)

    def _read(self, prompt: int, chunks: Iterator[GenerationChunk]) -> None:
        try:
            for chunk in chunks:
                self.put(prompt, chunk)
        except BaseException as error:  # noqa: BLE001 - raised again in the loop's task
            self.put(prompt, error)
