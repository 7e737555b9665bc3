"""A web server that drains before it stops: it refuses what is new and finishes what runs."""

import asyncio
import time
from types import FrameType

import uvicorn
from typing_extensions import override

from api.telemetry import get_logger
from worker.inference.generation import Generations
from worker.inference.pool import ModelPool

__all__ = ["DrainingServer"]

log = get_logger(__name__)

POLL_S = 0.05


class DrainingServer(uvicorn.Server):
    """Serves until a signal; the listening socket stays open while generations finish."""

    def __init__(
        self, config: uvicorn.Config, pool: ModelPool, generations: Generations, *, drain_s: float
    ) -> None:
        super().__init__(config)
        self._pool = pool
        self._generations = generations
        self._drain_s = drain_s
        self._drain_until: float | None = None

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; a second signal stops at once."""
        if self._drain_until is not None:
            super().handle_exit(sig, frame)
            return
        self._drain_until = time.monotonic() + self._drain_s
        self._pool.start_draining()
        log.info("draining", limit_s=self._drain_s)

    @override
    async def on_tick(self, counter: int) -> bool:
        """Let uvicorn stop once nothing runs any more, or the time is over."""
        if self._drain_until is not None and (
            self._generations.count == 0 or time.monotonic() >= self._drain_until
        ):
            await self._pool.close()
            await asyncio.sleep(POLL_S)
            self.should_exit = True
        return await super().on_tick(counter)
