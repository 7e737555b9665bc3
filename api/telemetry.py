"""What a process tells its operator: log lines of event and fields, ids in context, metrics.

Shared by API and worker. A log line is one JSON object; secrets never reach it.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.registry import Collector
from typing_extensions import override

__all__ = ["EventLogger", "Metrics", "bind_context", "configure_logging", "get_logger", "redact"]

SECRETS = re.compile(r"\b(hf_|abq_live_)[A-Za-z0-9]{20,}")
# the API answers most requests in milliseconds; held connections last up to a minute
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {
    "abq_fields", "asctime", "color_message", "message", "taskName",
}  # fmt: skip

# a context variable, so that threads and tasks each see their own request or job
_context: ContextVar[Mapping[str, str] | None] = ContextVar("abq_log_context", default=None)


class EventLogger:
    """Writes an event name and fields: `log.info("job_claimed", attempt=2)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: Any) -> None:
        """Record what only a developer needs."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Record what happened."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Record what may need a person."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Record what failed."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Record what failed, with the traceback of the exception being handled."""
        self._write(logging.ERROR, event, fields, with_traceback=True)

    def _write(
        self, level: int, event: str, fields: dict[str, Any], *, with_traceback: bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"abq_fields": fields}
            self._logger.log(level, "%s", event, exc_info=with_traceback, extra=extra)


def get_logger(name: str) -> EventLogger:
    """Make the logger of a module."""
    return EventLogger(name)


def configure_logging(level: str, stream: TextIO = sys.stderr) -> None:
    """Send this process's log to `stream`, one JSON object a line."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


@contextmanager
def bind_context(**fields: str) -> Iterator[None]:
    """Add fields, for example `request_id`, to every log line written inside the block."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def redact(text: str) -> str:
    """Cut API keys and Hub tokens out of a text."""
    return SECRETS.sub(r"\1[redacted]", text)


class Metrics:
    """The metrics of one process; a registry of its own, so that two apps never share one."""

    def __init__(self, *collectors: Collector) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "abq_http_request_duration_seconds",
            "Time until the last byte of a response.",
            labelnames=("method", "route", "status"),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        for each in collectors:
            self.registry.register(each)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request under its route's template, never under its path."""
        self._requests.labels(method, route, str(status)).observe(seconds)

    def render(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _JsonFormatter(logging.Formatter):
    @override
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": moment,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **(_context.get() or {}),
            # libraries and plain loggers give their fields as `extra`
            **{name: each for name, each in vars(record).items() if name not in STANDARD_FIELDS},
            **getattr(record, "abq_fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str, ensure_ascii=False))
