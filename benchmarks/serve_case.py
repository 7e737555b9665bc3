"""One load on a served model, and which ones tell most."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CASES", "GOALS", "TOY", "ServeCase"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCase:
    """Callers that each send the next request when the last one was answered."""

    shape: str
    config: str
    head_bits: int | None = None
    concurrency: int = 1
    """Callers whose requests are measured."""
    prompt: int = 1024
    new_tokens: int = 128
    requests: int = 32
    """Measured, of all callers together."""
    streams: int = 0
    """Other callers, whose answers never end and are not measured."""
    goal_ms: float | None = None
    """Median time to the first token that the project has set itself."""

    @property
    def label(self) -> str:
        """For a person."""
        busy = f" under {self.streams} streams" if self.streams else ""
        return (
            f"{self.shape} {self.config} x{self.concurrency}{busy} {self.prompt}/{self.new_tokens}"
        )


def _case(**load: int | float) -> ServeCase:
    return ServeCase(shape="llama-3-8b", config="w4a8kv8", **load)  # type: ignore[arg-type]


GOALS: Sequence[ServeCase] = (
    _case(new_tokens=16, requests=24, goal_ms=35.0),
    _case(new_tokens=16, requests=24, streams=32, goal_ms=150.0),
    _case(concurrency=64, new_tokens=256, requests=192),
)
CASES: Sequence[ServeCase] = (
    *GOALS,
    _case(prompt=128, requests=4),
    _case(concurrency=8, prompt=128, requests=32),
    _case(concurrency=32, prompt=128, requests=128),
    _case(concurrency=32, prompt=1000, new_tokens=1000, requests=32),
    ServeCase(shape="llama-7b", config="w2a8", prompt=128, new_tokens=256, requests=4),
)
TOY: Sequence[ServeCase] = (
    ServeCase(shape="toy", config="w4a8kv8", concurrency=2, prompt=20, new_tokens=5, requests=4),
    ServeCase(shape="toy", config="w4a8kv8", prompt=20, new_tokens=3, requests=2, streams=2),
)
