"""What plans are bounded by: the runner's buffers and the operator's wishes; no tensors."""

from dataclasses import dataclass
from typing import Self

from engine.inference.steps import Runner

__all__ = ["RunnerShape", "SchedulerLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How much is computed at once and how much may wait."""

    max_step_tokens: int = 2048
    """Tokens of a step, decoded ones and chunks of prompts together."""
    max_waiting: int = 256
    """Sequences that may wait beyond those that find a slot."""
    max_waiting_tokens: int = 1 << 20
    """Prompt tokens that may wait; a request that finds nobody waiting may have more."""
    is_prefix_cached: bool = True
    """Whether sequences that begin alike share pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerShape:
    """What of a runner plans depend on."""

    max_sequences: int
    page_size: int
    pages: int
    context_length: int
    vocabulary: int

    @classmethod
    def of(cls, runner: Runner) -> Self:
        """Read it off."""
        return cls(
            max_sequences=runner.max_sequences,
            page_size=runner.page_size,
            pages=runner.pages,
            context_length=runner.context_length,
            vocabulary=runner.vocabulary,
        )

    @property
    def cache_tokens(self) -> int:
        """Tokens that all pages hold together."""
        return self.pages * self.page_size
