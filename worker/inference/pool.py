"""The models in memory: loaded on demand, one at a time; the least recently used makes room.

All state belongs to the event loop's thread; only opening and closing a model leave it.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import Any, Protocol

from api.errors import InferenceDraining, InferenceOverloaded, ModelLoading, ServiceError
from api.telemetry import get_logger
from engine.errors import EngineError
from engine.inference.engine import InferenceEngine

__all__ = ["HostedModel", "ModelFailed", "ModelPool", "ModelShelf", "ModelStatus"]

log = get_logger(__name__)

RETRY_S = 30.0
"""A model that failed to load is not read and hashed again for every request."""


class ModelStatus(StrEnum):
    """Where a model is between disk and use."""

    LOADING = "loading"
    """It is being verified and read."""
    READY = "ready"
    """It answers."""
    FAILED = "failed"
    """It could not be loaded; `load` tries again, as does a request after a while."""


class ModelFailed(ServiceError):
    """The model cannot be loaded."""

    code = "model_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedModel:
    """What a caller may know of a model in the pool."""

    artifact_id: str
    status: ModelStatus
    error: str | None
    memory_bytes: int


class ModelShelf(Protocol):
    """Where models are opened from."""

    def check(self, artifact_id: str) -> None:
        """Raise `ModelNotHosted` if there is no such model."""

    def memory_needed(self, artifact_id: str) -> int:
        """Bytes that opening will take at most."""

    def open(self, artifact_id: str) -> InferenceEngine:
        """Read a model into memory; blocks."""


class ModelPool:
    """Models by artifact id, within a memory budget."""

    def __init__(self, shelf: ModelShelf, *, budget_bytes: int, load_timeout_s: float) -> None:
        self._shelf = shelf
        self._budget_bytes = budget_bytes
        self._load_timeout_s = load_timeout_s
        self._entries: dict[str, _Entry] = {}
        self._one_load = asyncio.Lock()
        self._ticks = count()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_draining = False

    def load(self, artifact_id: str) -> None:
        """Begin to load a model unless it is here or on its way.

        Raises:
            ModelNotHosted: there is no such artifact.
            InferenceDraining: the process is about to stop.
        """
        self._ensure(artifact_id, is_asked_again=True)

    def list_models(self) -> list[HostedModel]:
        """Every model in the pool, the most recently used first."""
        entries = sorted(self._entries.values(), key=lambda entry: -entry.used_tick)
        return [
            HostedModel(
                artifact_id=entry.artifact_id,
                status=entry.status,
                error=entry.error,
                memory_bytes=entry.memory_bytes,
            )
            for entry in entries
        ]

    @asynccontextmanager
    async def use(self, artifact_id: str) -> AsyncIterator[InferenceEngine]:
        """Hold a model in memory, loading it first where needed.

        Raises:
            ModelNotHosted: there is no such artifact.
            ModelFailed: it cannot be loaded.
            ModelLoading: loading took too long; it goes on.
            InferenceOverloaded: the models in use leave no room.
            InferenceDraining: the process is about to stop.
        """
        entry = self._ensure(artifact_id, is_asked_again=False)
        entry.users += 1
        try:
            # shielded: another request may wait for the same load
            done, _ = await asyncio.wait({entry.loading}, timeout=self._load_timeout_s)
            if not done:
                raise ModelLoading
            entry.used_tick = next(self._ticks)
            yield entry.loading.result()
        finally:
            entry.users -= 1

    async def unload(self, artifact_id: str) -> None:
        """Drop a model; generations that run on it end at their next token."""
        entry = self._entries.pop(artifact_id, None)
        if entry is None:
            return
        closing = asyncio.create_task(_close(entry))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        # a load cannot be broken off in the middle of a file, and nobody waits for that
        if entry.loading.done():
            await closing

    def start_draining(self) -> None:
        """Load and hand out nothing any more."""
        self._is_draining = True

    @property
    def is_draining(self) -> bool:
        """Whether the process is about to stop."""
        return self._is_draining

    async def close(self) -> None:
        """Drop all models."""
        self._is_draining = True
        for artifact_id in list(self._entries):
            await self.unload(artifact_id)
        if self._closing:
            await asyncio.wait(self._closing)

    def _ensure(self, artifact_id: str, *, is_asked_again: bool) -> "_Entry":
        if self._is_draining:
            raise InferenceDraining
        entry = self._entries.get(artifact_id)
        if entry is None or entry.may_try_again(is_asked_again=is_asked_again):
            self._shelf.check(artifact_id)
            entry = _Entry(artifact_id, next(self._ticks))
            entry.loading = asyncio.create_task(self._load(entry))
            # a load that nobody waits for must not be reported as a lost exception
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._entries[artifact_id] = entry
        return entry

    async def _load(self, entry: "_Entry") -> InferenceEngine:
        try:
            async with self._one_load:
                needed = await asyncio.to_thread(self._shelf.memory_needed, entry.artifact_id)
                await self._make_room(needed)
                entry.memory_bytes = needed
                engine = await asyncio.to_thread(self._shelf.open, entry.artifact_id)
                entry.memory_bytes = engine.memory_bytes
                # the estimate was made from the files; what counts is what was taken
                while self._taken_bytes() > self._budget_bytes and await self._evict():
                    pass
        except InferenceOverloaded:
            self._forget(entry)
            raise
        except (EngineError, ServiceError) as error:
            entry.fail(error.message)
            raise ModelFailed(error.message) from error
        except Exception as error:
            log.exception("model_load_failed", artifact_id=entry.artifact_id)
            entry.fail("the model could not be loaded")
            raise ModelFailed from error
        entry.engine = engine
        entry.status = ModelStatus.READY
        log.info("model_loaded", artifact_id=entry.artifact_id, bytes=engine.memory_bytes)
        return engine

    async def _make_room(self, needed: int) -> None:
        if needed > self._budget_bytes:
            raise ModelFailed(
                f"the model needs {needed} bytes of the {self._budget_bytes} there are"
            )
        while self._taken_bytes() + needed > self._budget_bytes:
            if not await self._evict():
                raise InferenceOverloaded("the models in use leave no room for another; try again")

    async def _evict(self) -> bool:
        idle = [e for e in self._entries.values() if e.engine is not None and not e.users]
        if not idle:
            return False
        oldest = min(idle, key=lambda entry: entry.used_tick)
        log.info("model_evicted", artifact_id=oldest.artifact_id)
        await self.unload(oldest.artifact_id)
        return True

    def _taken_bytes(self) -> int:
        return sum(entry.memory_bytes for entry in self._entries.values())

    def _forget(self, entry: "_Entry") -> None:
        if self._entries.get(entry.artifact_id) is entry:
            del self._entries[entry.artifact_id]


class _Entry:
    loading: "asyncio.Task[InferenceEngine]"

    def __init__(self, artifact_id: str, tick: int) -> None:
        self.artifact_id = artifact_id
        self.status = ModelStatus.LOADING
        self.error: str | None = None
        self.engine: Any = None
        self.memory_bytes = 0
        self.users = 0
        self.used_tick = tick
        self._failed_at = 0.0

    def fail(self, message: str) -> None:
        self.status, self.error, self.memory_bytes = ModelStatus.FAILED, message, 0
        self._failed_at = time.monotonic()

    def may_try_again(self, *, is_asked_again: bool) -> bool:
        if self.status is not ModelStatus.FAILED:
            return False
        return is_asked_again or time.monotonic() - self._failed_at >= RETRY_S


async def _close(entry: _Entry) -> None:
    await asyncio.wait({entry.loading})
    if entry.engine is not None:
        await asyncio.to_thread(entry.engine.close)
