"""Why an attempt failed, in the words of the job's `error`, and whether another one may help."""

import errno
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.errors import HubUnavailable, ServiceError
from api.telemetry import redact
from engine.errors import EngineError
from worker.child_process import ChildProcess

__all__ = ["AttemptFailed", "Failure", "failure_of_child", "failure_of_error"]

# memory may be free the next time, and a stranger's SIGTERM says nothing about the job;
# everything else that the engine reports is about the input
TRANSIENT_CODES = frozenset({"calibration_interrupted", "out_of_memory"})
MAX_MESSAGE = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended an attempt."""

    code: str
    message: str
    layer: str | None = None
    is_transient: bool = False
    """Another attempt may succeed."""

    def to_json(self) -> dict[str, Any]:
        """Write what the job's `error` holds; no secret survives in the message."""
        message = redact(self.message)[:MAX_MESSAGE]
        return {"code": self.code, "message": message, "layer": self.layer}


class AttemptFailed(Exception):
    """The attempt cannot go on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failure_of_child(child: ChildProcess) -> Failure | None:
    """Read how a calibration process ended; None when it delivered its report."""
    final, code = child.final, child.exit_code
    if final is not None and final["type"] == "result" and code == 0:
        return None
    if final is not None and final["type"] == "error":
        return _failure_of_record(final)
    if code == -signal.SIGKILL:
        return Failure(
            code="out_of_memory",
            message="the calibration process was killed, as happens when memory runs out",
            is_transient=True,
        )
    ended = f"the calibration process ended with {_describe_exit(code)}"
    return Failure(
        code="calibration_crashed",
        message=f"{ended}: {_last_line(child.log_tail())}",
        is_transient=True,
    )


def failure_of_error(error: Exception) -> Failure:
    """Translate what fetching, storing or publishing raised."""
    match error:
        case HubUnavailable():
            return Failure(code=error.code, message=error.message, is_transient=True)
        case ServiceError() | EngineError():
            return Failure(code=error.code, message=error.message)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return Failure(code="disk_full", message="the worker's disk is full")
        case _:
            # the details are in the worker's log; they may name paths that are nobody's business
            return Failure(
                code="internal_error",
                message=f"the worker failed: {type(error).__name__}",
                is_transient=True,
            )


def _failure_of_record(record: Mapping[str, Any]) -> Failure:
    code, layer = str(record.get("code", "engine_error")), record.get("layer")
    return Failure(
        code=code,
        message=str(record.get("message", "")),
        layer=None if layer is None else str(layer),
        is_transient=code in TRANSIENT_CODES,
    )


def _last_line(text: str) -> str:
    return text.rpartition("\n")[2] or "it wrote nothing"


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"
