"""What operators' probes read."""

from typing import Literal

from api.schemas.base import Schema

__all__ = ["ErrorMeaning", "Health", "Readiness"]


class Health(Schema):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(Schema):
    """Whether requests can be served, and what each part says."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]
    """`ok` or what is wrong, by part; `inference` is told, but nothing else waits for it."""

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served."""
        return self.status == "ready"


class ErrorMeaning(Schema):
    """What an error code means."""

    code: str
    status: int
    meaning: str
