"""What the engine counts, and a snapshot of it; no tensors."""

from dataclasses import dataclass

__all__ = ["EngineStatistics", "SchedulerCounts", "StepClock"]


@dataclass(slots=True, kw_only=True)
class SchedulerCounts:
    """What happened in plans since the start."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    discarded_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class StepClock:
    """How long steps took, on the monotonic clock."""

    beat_s: float
    """When the engine's thread last came round."""
    steps: int = 0
    step_s: float = 0.0
    last_step_s: float = 0.0
    _ended_s: float = 0.0

    def add(self, launched_s: float, ended_s: float) -> None:
        """Count a step; one launched early began when the step before it ended."""
        self.steps += 1
        self.last_step_s = ended_s - max(launched_s, self._ended_s)
        self.step_s += self.last_step_s
        self._ended_s = ended_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """The engine at one moment; counters run from its start."""

    running: int
    """Sequences with a slot."""
    waiting: int
    """Sequences without one, preempted ones too."""
    kv_usage: float
    """Part of the KV pages that running sequences hold, 0 to 1."""
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there."""
    preemptions: int
    prompt_tokens: int
    """Tokens of prompts begun, those found in the prefix cache too."""
    generation_tokens: int
    """Tokens delivered."""
    discarded_tokens: int
    """Tokens drawn in vain, for sequences that had ended meanwhile."""
    drafts_proposed: int
    drafts_accepted: int
    faults: int
    """Exceptions of the runner."""
    steps: int
    step_s: float
    """Seconds of all steps, each from its launch, or the end of the one before, to its result."""
    last_step_s: float
    beat_age_s: float
    """Seconds since the engine's thread last came round; beyond a few it hangs."""
