"""Everything an operator can set. The environment wins: `ABQ_DATABASE__URL`, `ABQ_HUB__TOKEN`, ...

Nothing set means the one-machine form: SQLite, a filesystem broker and artifacts in `data_dir`.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings", "configure_hub_client"]

GIB = 1 << 30


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Group):
    """Where the API listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 15.0
    """Generations that run may take so long when the process stops."""


class DatabaseSettings(_Group):
    """Where the state lives."""

    url: str | None = None
    """`postgresql+psycopg://...` or `sqlite:///...`; None is SQLite in `data_dir`."""


class QueueSettings(_Group):
    """How workers are woken."""

    broker_url: str | None = None
    """`redis://...` or `amqp://...`; None is kombu's filesystem transport in `data_dir`."""
    relay_interval_s: float = 0.5
    reap_interval_s: float = 15.0
    republish_after_s: float = 60.0
    """A queued job not woken for this long is woken again; doubles up to 15 minutes."""


class StorageSettings(_Group):
    """Where artifacts are kept; a shared file system in the form with many machines."""

    root: Path | None = None


class HubSettings(_Group):
    """The model hub."""

    endpoint: str = "https://huggingface.co"
    token: SecretStr | None = None
    model_roots: dict[str, Path] = Field(default_factory=dict)
    """Local models: `local:<name>/<folder>` is `<folder>` below the path of `<name>`."""
    text_roots: dict[str, Path] = Field(default_factory=dict)
    """Local calibration texts: `local:<name>/<file>`."""
    timeout_s: float = 10.0


class LimitSettings(_Group):
    """What one request or tenant may ask for."""

    max_parameters: int = 80_000_000_000
    max_source_bytes: int = 200 * GIB
    request_bytes: int = 256 * 1024
    prompt_bytes: int = 4 * 1024 * 1024
    """The same for requests to hosted models, which carry whole documents."""
    key_requests: int = 64
    """Generations of one API key at a time; each API process counts for itself."""
    key_tokens_per_minute: int = 1_000_000
    """Tokens of one API key, read and generated."""
    active_jobs: int = 100
    """Queued and running jobs of one tenant."""
    disk_reserve: float = 0.1
    """Share of the disk that stays free."""
    idempotency_hours: int = 24


class WorkerSettings(_Group):
    """How a worker runs a job."""

    lease_s: float = 60.0
    heartbeat_s: float = 2.0
    grace_s: float = 30.0
    """Between SIGTERM and SIGKILL of the calibration process."""
    max_attempts: int = 3
    threads: int | None = None
    """CPU threads of the calibration; None leaves it to torch."""
    device: str | None = None
    """`cpu` or `cuda`; None takes a GPU where there is one."""
    task_dir: Path | None = None
    """Definitions of zero-shot tasks with their data, instead of those of lm-eval."""


class InferenceSettings(_Group):
    """The inference service behind the deployments."""

    url: str = "http://127.0.0.1:8001"
    replica_urls: tuple[str, ...] = ()
    """Further services with the same artifacts; each request goes to the least busy one."""
    token: SecretStr | None = None
    """Shared secret between API and inference service."""
    memory_bytes: int = 8 * GIB
    """Loaded models beyond this evict the least recently used."""
    idle_unload_s: float | None = 3600.0
    """A model that nobody asked for this long leaves memory; None keeps it."""
    kv_bytes: int = GIB
    """Of each model, for keys and values; counted with its weights."""
    context_length: int | None = None
    """Tokens of prompt and answer at most; None for what each model has."""
    head_bits: Literal[4, 8] | None = None
    """Rounds the output head of every model; None keeps it as it is stored."""
    draft_tokens: int = Field(default=0, ge=0, le=16)
    """Guesses a step for greedy answers, from what was said before."""
    max_running: int = 64
    """Answers that a model generates at a time; the others wait."""
    max_waiting: int = 32
    """Generations that wait; more are refused with 503."""
    drain_s: float = 25.0
    """What runs may take so long when the process stops; below the 30 s of most containers."""
    device: str | None = None
    threads: int | None = None
    load_timeout_s: float = 600.0


class Settings(BaseSettings):
    """All settings of one process, read once when it starts."""

    model_config = SettingsConfigDict(
        env_prefix="ABQ_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    data_dir: Path = Path.home() / ".local" / "share" / "abq"
    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    queue: QueueSettings = QueueSettings()
    storage: StorageSettings = StorageSettings()
    hub: HubSettings = HubSettings()
    limits: LimitSettings = LimitSettings()
    worker: WorkerSettings = WorkerSettings()
    inference: InferenceSettings = InferenceSettings()
    log_level: str = "info"

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database.url or f"sqlite:///{self.data_dir / 'abq.db'}"

    @property
    def broker_url(self) -> str:
        """The kombu URL in force."""
        return self.queue.broker_url or "filesystem://"

    @property
    def broker_dir(self) -> Path:
        """Folder of the filesystem transport."""
        return self.data_dir / "broker"

    @property
    def storage_root(self) -> Path:
        """Folder of finished artifacts."""
        return self.storage.root or self.data_dir / "artifacts"

    @property
    def work_dir(self) -> Path:
        """Folder of downloads, layer checkpoints and unfinished outputs, one sub-folder a job."""
        return self.data_dir / "work"


def configure_hub_client() -> None:
    """Tell huggingface_hub, which reads the environment at import, to keep to what it is told."""
    os.environ.update(
        # one commit per push: with Xet an upload is several, and visible half-done
        HF_HUB_DISABLE_XET="1",
        # only the token of the settings is ever sent
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",  # noqa: S106 - a switch, not a token
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
