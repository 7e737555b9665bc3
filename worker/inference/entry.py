"""One model of the pool: from the request to load it until it leaves memory."""

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum

from api.errors import ServiceError
from engine.inference.engine import InferenceEngine
from worker.inference.activity import Activity, end_of, statistics_of
from worker.inference.progress import LoadProgress, LoadStage

__all__ = ["Entry", "HostedModel", "ModelFailed", "ModelLabels", "ModelStatus"]

HUNG_S = 60.0
"""No step takes so long, not even one that compiles kernels first."""
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
class ModelLabels:
    """What metrics call a model."""

    artifact_id: str
    model_name: str
    w_bits: str
    a_bits: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedModel:
    """What a caller may know of a model in the pool."""

    artifact_id: str
    status: ModelStatus
    error: str | None
    stage: LoadStage | None
    progress: float | None
    memory_bytes: int
    running: int
    waiting: int
    tokens_per_s: float


class Entry:
    """Belongs to the event loop's thread; progress alone is told from the one that loads."""

    loading: "asyncio.Task[InferenceEngine]"

    def __init__(self, artifact_id: str, tick: int) -> None:
        self.artifact_id = artifact_id
        self.status = ModelStatus.LOADING
        self.error: str | None = None
        self.engine: InferenceEngine | None = None
        self.labels: ModelLabels | None = None
        self.memory_bytes = 0
        self.activity = Activity()
        self.progress = LoadProgress(stage=LoadStage.QUEUED, fraction=0.0)
        self.used_tick = tick
        self.used_at = time.monotonic()
        self.users = 0
        self._failed_at = 0.0

    def follow(self, progress: LoadProgress) -> None:
        """Take over how far loading is."""
        self.progress = progress

    def be_ready(self, engine: InferenceEngine) -> None:
        """Answer from now on."""
        self.engine, self.status = engine, ModelStatus.READY
        self.used_at = time.monotonic()

    def fail(self, message: str) -> None:
        """Be of no use, and say why."""
        self.status, self.error, self.memory_bytes = ModelStatus.FAILED, message, 0
        self._failed_at = time.monotonic()

    def may_try_again(self, *, is_asked_again: bool) -> bool:
        """Whether a failure is old enough, or somebody insists."""
        if self.status is not ModelStatus.FAILED:
            return False
        return is_asked_again or time.monotonic() - self._failed_at >= RETRY_S

    def is_idle_for(self, seconds: float) -> bool:
        """Whether nobody used it for so long."""
        is_unused = self.engine is not None and not self.users
        return is_unused and time.monotonic() - self.used_at >= seconds

    @property
    def is_lost(self) -> bool:
        """Whether its engine broke for good."""
        return self.engine is not None and end_of(self.engine) is not None

    @property
    def is_hung(self) -> bool:
        """Whether its engine has work and does not come round any more."""
        found = statistics_of(self.engine)
        return found is not None and found.running > 0 and found.beat_age_s > HUNG_S

    def load(self) -> tuple[int, int]:
        """Generations that run and that wait, by the engine's own count where it has one."""
        found = statistics_of(self.engine)
        if found is None:
            return self.activity.running, self.activity.waiting
        return found.running, found.waiting

    def show(self) -> HostedModel:
        """What a caller may know."""
        running, waiting = self.load()
        is_loading = self.status is ModelStatus.LOADING
        return HostedModel(
            artifact_id=self.artifact_id,
            status=self.status,
            error=self.error,
            stage=self.progress.stage if is_loading else None,
            progress=round(self.progress.fraction, 3) if is_loading else None,
            memory_bytes=self.memory_bytes,
            running=running,
            waiting=waiting,
            tokens_per_s=round(self.activity.tokens_per_s, 2),
        )

    async def close(self) -> None:
        """Free the model, once a load that cannot be broken off has ended."""
        await asyncio.wait({self.loading})
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)
