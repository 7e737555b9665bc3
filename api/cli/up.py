"""The one-machine form: API, worker and inference process under one command.

Database, broker and artifacts are files in the data directory. One Ctrl-C stops everything.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from api.cli.address import Address, api_address, inference_address
from api.cli.config import ClientConfig, read_client_config, write_client_config
from api.cli.environment import settings_environment
from api.cli.errors import CliError
from api.cli.log_lines import LogLines
from api.cli.processes import ProcessGroup, Program
from api.cli.signals import StopSignals, catch_signals
from api.cli.welcome import Voice
from api.db.connection import Database
from api.db.migrations import upgrade_database
from api.services.keys import create_first_key
from api.settings import DatabaseSettings, HubSettings, QueueSettings, Settings

__all__ = ["run_up"]

TICK_S = 0.2
MAX_FAILURES = 5
"""Starts in a row that may fail before the service gives up."""
STOP_MARGIN_S = 15.0
"""On top of what a program itself gives its work to end."""


def run_up(settings: Settings, *, show_logs: bool = False) -> int:
    """Run the service until a signal ends it; returns the exit code.

    Raises:
        CliError: if another instance uses the data directory, or a port is taken.
    """
    voice = Voice()
    settings = _with_inference_token(settings)
    # database, artifacts and the client's key are nobody else's business
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _hold_data_dir(settings), catch_signals() as signals:
        api, inference = api_address(settings), inference_address(settings)
        for address in (api, inference):
            address.check_free()
        with voice.preparing():
            upgrade_database(settings.database_url)
            key = _ensure_key(settings, api)
        programs = _programs(settings)
        logs = LogLines([_log_dir(settings) / f"{each.name}.log" for each in programs])
        group = ProcessGroup(programs, log_dir=_log_dir(settings), on_restart=voice.tell_restart)
        try:
            group.start()
            with voice.starting():
                is_up = _wait_until_ready(group, signals, api, inference)
            if is_up:
                voice.welcome(settings, api.url, key)
            return _tend(group, signals, voice, logs if show_logs else None)
        finally:
            voice.tell_stop()
            group.stop(lambda: signals.count > 1)
            voice.tell_stopped()


def _wait_until_ready(
    group: ProcessGroup, signals: StopSignals, api: Address, inference: Address
) -> bool:
    while not signals.wait(TICK_S):
        group.tend()
        if group.is_failing(MAX_FAILURES):
            return False
        if api.answers("/readyz") and inference.answers("/ready"):
            return True
    return False


def _tend(group: ProcessGroup, signals: StopSignals, voice: Voice, logs: LogLines | None) -> int:
    while not signals.wait(TICK_S):
        group.tend()
        if group.is_failing(MAX_FAILURES):
            voice.tell_failure()
            return 1
        for line in logs.read() if logs is not None else ():
            voice.show_line(line)
    return 0


def _programs(settings: Settings) -> list[Program]:
    # on a busy machine, threads that spin while they wait cost several times the work
    inherited = {"OMP_WAIT_POLICY": "passive", **os.environ}
    everything = settings_environment(settings, inherited)
    # it opens what strangers made, so it gets no secret that it has no use for
    bare = settings.model_copy(
        update={"hub": HubSettings(), "database": DatabaseSettings(), "queue": QueueSettings()}
    )
    harmless = {name: value for name, value in inherited.items() if not _is_secret(name)}
    return [
        Program(name="api", module="api", stop_s=STOP_MARGIN_S, environment=everything),
        Program(
            name="inference",
            module="worker.inference",
            stop_s=30.0 + STOP_MARGIN_S,
            environment=settings_environment(bare, harmless),
        ),
        Program(
            name="worker",
            module="worker",
            stop_s=settings.worker.grace_s + STOP_MARGIN_S,
            environment=everything,
        ),
    ]


def _is_secret(name: str) -> bool:
    return any(word in name for word in ("TOKEN", "SECRET", "PASSWORD", "API_KEY"))


def _with_inference_token(settings: Settings) -> Settings:
    if settings.inference.token is not None:
        return settings
    # new at each start: nobody but these processes needs it
    token = SecretStr(secrets.token_urlsafe(32))
    inference = settings.inference.model_copy(update={"token": token})
    return settings.model_copy(update={"inference": inference})


def _ensure_key(settings: Settings, api: Address) -> str | None:
    database = Database(settings.database_url)
    try:
        key = create_first_key(database)
    finally:
        database.close()
    try:
        kept = read_client_config(settings.data_dir).api_key
    except ValueError as error:
        raise CliError(str(error)) from error
    write_client_config(settings.data_dir, ClientConfig(url=api.url, api_key=key or kept))
    return key


def _log_dir(settings: Settings) -> Path:
    return settings.data_dir / "logs"


@contextmanager
def _hold_data_dir(settings: Settings) -> Iterator[None]:
    path = settings.data_dir / "up.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"abq up already runs in {settings.data_dir}; stop it or set ABQ_DATA_DIR"
            raise CliError(message) from error
        yield
