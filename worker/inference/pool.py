"""The models in memory: loaded on demand, one at a time; the least recently used makes room.

All state belongs to the event loop's thread; only opening and closing a model leave it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from api.errors import InferenceDraining, InferenceOverloaded, ModelLoading, ServiceError
from api.telemetry import get_logger
from engine.errors import EngineError
from engine.inference.engine import InferenceEngine
from engine.inference.faults import let_go_of_frames
from worker.inference.activity import Activity
from worker.inference.entry import Entry, HostedModel, ModelFailed, ModelLabels
from worker.inference.progress import ProgressSink

__all__ = ["ModelInUse", "ModelPool", "ModelShelf"]

log = get_logger(__name__)

IDLE_CHECKS = 10
"""Looks for idle models in the time after which one leaves."""


class ModelShelf(Protocol):
    """Where models are opened from."""

    def check(self, artifact_id: str) -> None:
        """Raise `ModelNotHosted` if there is no such model."""

    def describe(self, artifact_id: str) -> ModelLabels:
        """What metrics call the model."""

    def memory_needed(self, artifact_id: str) -> int:
        """Bytes that opening will take at most."""

    def open(self, artifact_id: str, on_progress: ProgressSink) -> InferenceEngine:
        """Read a model into memory; blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInUse:
    """A model that stays in memory while somebody holds this."""

    engine: InferenceEngine
    labels: ModelLabels
    activity: Activity


class ModelPool:
    """Models by artifact id, within a memory budget."""

    def __init__(
        self,
        shelf: ModelShelf,
        *,
        budget_bytes: int,
        load_timeout_s: float,
        idle_unload_s: float | None = None,
    ) -> None:
        self._shelf = shelf
        self._budget_bytes = budget_bytes
        self._load_timeout_s = load_timeout_s
        self._idle_unload_s = idle_unload_s
        self._entries: dict[str, Entry] = {}
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
        return [entry.show() for entry in self.entries()]

    def entries(self) -> Sequence[Entry]:
        """What `list_models` shows, for those who count."""
        return sorted(self._entries.values(), key=lambda entry: -entry.used_tick)

    @asynccontextmanager
    async def use(self, artifact_id: str) -> AsyncIterator[ModelInUse]:
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
            engine = entry.loading.result()
            entry.used_tick = next(self._ticks)
            assert entry.labels is not None  # noqa: S101 - set before the engine is opened
            yield ModelInUse(engine=engine, labels=entry.labels, activity=entry.activity)
        finally:
            entry.users -= 1
            entry.used_at = time.monotonic()

    async def unload(self, artifact_id: str) -> None:
        """Drop a model; generations that run on it end at their next token."""
        entry = self._entries.pop(artifact_id, None)
        if entry is None:
            return
        closing = self._close(entry)
        # a load cannot be broken off in the middle of a file, and nobody waits for that
        if entry.loading.done():
            await closing

    async def unload_idle(self) -> None:
        """Drop models that nobody uses, for as long as the process runs."""
        if self._idle_unload_s is None:
            return
        while True:
            await asyncio.sleep(self._idle_unload_s / IDLE_CHECKS)
            for entry in self.entries():
                if entry.is_idle_for(self._idle_unload_s):
                    log.info("model_idle", artifact_id=entry.artifact_id)
                    await self.unload(entry.artifact_id)

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

    def _ensure(self, artifact_id: str, *, is_asked_again: bool) -> Entry:
        if self._is_draining:
            raise InferenceDraining
        entry = self._entries.get(artifact_id)
        if entry is not None and entry.is_lost:
            # its device may be well again: nothing of the old engine is used
            log.error("model_lost", artifact_id=artifact_id)
            self._close(self._entries.pop(artifact_id))
            entry = None
        if entry is None or entry.may_try_again(is_asked_again=is_asked_again):
            self._shelf.check(artifact_id)
            entry = Entry(artifact_id, next(self._ticks))
            entry.loading = asyncio.create_task(self._load(entry))
            # a load that nobody waits for must not be reported as a lost exception
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._entries[artifact_id] = entry
        return entry

    async def _load(self, entry: Entry) -> InferenceEngine:
        try:
            async with self._one_load:
                engine = await self._open(entry)
        except InferenceOverloaded:
            self._forget(entry)
            raise
        except (EngineError, ServiceError) as error:
            let_go_of_frames(error)
            entry.fail(error.message)
            raise ModelFailed(error.message) from error
        except Exception as error:
            log.exception("model_load_failed", artifact_id=entry.artifact_id)
            let_go_of_frames(error)
            entry.fail("the model could not be loaded")
            raise ModelFailed from error
        entry.be_ready(engine)
        log.info("model_loaded", artifact_id=entry.artifact_id, bytes=engine.memory_bytes)
        return engine

    async def _open(self, entry: Entry) -> InferenceEngine:
        needed = await asyncio.to_thread(self._shelf.memory_needed, entry.artifact_id)
        entry.labels = await asyncio.to_thread(self._shelf.describe, entry.artifact_id)
        await self._make_room(needed)
        entry.memory_bytes = needed
        engine = await asyncio.to_thread(self._shelf.open, entry.artifact_id, entry.follow)
        entry.memory_bytes = engine.memory_bytes
        # the estimate was made from the files; what counts is what was taken
        while self._taken_bytes() > self._budget_bytes and await self._evict():
            pass
        return engine

    def _close(self, entry: Entry) -> "asyncio.Task[None]":
        closing = asyncio.create_task(entry.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing

    async def _make_room(self, needed: int) -> None:
        if needed > self._budget_bytes:
            raise ModelFailed(
                f"the model needs {needed} bytes of the {self._budget_bytes} there are"
            )
        while self._taken_bytes() + needed > self._budget_bytes:
            if not await self._evict():
                raise InferenceOverloaded("the models in use leave no room for another; try again")

    async def _evict(self) -> bool:
        idle = [entry for entry in self._entries.values() if entry.is_idle_for(0.0)]
        if not idle:
            return False
        oldest = min(idle, key=lambda entry: entry.used_tick)
        log.info("model_evicted", artifact_id=oldest.artifact_id)
        await self.unload(oldest.artifact_id)
        return True

    def _taken_bytes(self) -> int:
        return sum(entry.memory_bytes for entry in self._entries.values())

    def _forget(self, entry: Entry) -> None:
        if self._entries.get(entry.artifact_id) is entry:
            del self._entries[entry.artifact_id]
