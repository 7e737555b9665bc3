"""What is asked of a model and what it answers, piece by piece; no tensors."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from engine.errors import EngineError

__all__ = ["FinishReason", "GenerationChunk", "GenerationRequest", "RequestInvalid"]

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TEMPERATURE = 2.0


class RequestInvalid(EngineError, ValueError):
    """A field of the generation request is not possible."""

    code: ClassVar[str] = "invalid_request"

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value!r} is not possible: {remedy}")
        self.field = field


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The model ended its turn, or a stop string came up."""
    LENGTH = "length"
    """`max_tokens` were generated."""
    CANCELLED = "cancelled"
    """The caller went away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to continue it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int | None = None
    """None fills the model's context."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int | None = None
    """Equal seeds give equal texts; None draws one."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation and are not part of it."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestInvalid("prompt", "", "write at least one token")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestInvalid("max_tokens", self.max_tokens, "use at least 1")
        # written so that NaN fails too
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise RequestInvalid("temperature", self.temperature, f"use 0 to {MAX_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            raise RequestInvalid("top_p", self.top_p, "use more than 0 and at most 1")
        if self.top_k < 0:
            raise RequestInvalid("top_k", self.top_k, "use 0 (all) or more")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestInvalid("seed", self.seed, "use a 64-bit number")
        if len(self.stop) > MAX_STOPS or not all(0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise RequestInvalid(
                "stop",
                list(self.stop),
                f"use up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """Text that became certain, and how far the generation is."""

    text: str
    """May be empty while the next character or a stop string is undecided."""
    completion_tokens: int
    """Tokens generated so far, the ending one included."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk."""
