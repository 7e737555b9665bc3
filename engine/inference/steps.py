"""What passes between scheduler and runner: plans of steps, drawn tokens; no tensors.

A step computes tokens of several sequences at once. Each sequence has a slot, its row in the
runner's persistent buffers, and pages, where its keys and values lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import GuideFailed
from engine.inference.sampling_params import SamplingParams

__all__ = [
    "MAX_SCORED_TOKENS",
    "Drawn",
    "PendingStep",
    "Runner",
    "SequenceStep",
    "StepPlan",
    "StepResult",
    "TokenLogprobs",
]

MAX_SCORED_TOKENS = 128
"""Tokens scored in one step: the logits of each are kept, 64 MB together for 128000 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """What one sequence does in one step."""

    slot: int
    """Its row in the runner's persistent buffers, ``0 <= slot < max_sequences``."""
    start: int
    """Position of the first token computed: how many tokens its KV pages hold already."""
    token_ids: tuple[int, ...]
    """Tokens to compute; empty for the one token that the runner drew last for this slot, which is
    still on the device."""
    page_ids: tuple[int, ...]
    """KV pages of the sequence in order, enough for `start` + `count` tokens."""
    draws: bool
    """Whether the token behind the last one is drawn: not for chunks of a prompt but its last."""
    drafts: int = 0
    """The last so many of `token_ids` are guesses to verify."""
    score_ids: tuple[int, ...] = ()
    """Tokens of a prompt to score, each behind one of the last tokens computed, in order; `draws`
    is False then."""
    score_top: int = 0
    """How many of the likeliest tokens to tell beside each of `score_ids`."""

    @property
    def count(self) -> int:
        """Tokens computed."""
        return max(1, len(self.token_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One launch of the runner."""

    steps: tuple[SequenceStep, ...]
    """Decoding sequences, of one token each, come first."""

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token and draws the next."""
        return all(step.count == 1 and step.draws for step in self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely a token was, drawn or given, and what was likelier."""

    token_id: int
    logprob: float
    """Natural logarithm, of the logits before temperature."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, in falling order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a sequence won in a step: a token, one more than the drafts accepted, or scores."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token where the request asks for them."""
    scores: tuple[TokenLogprobs, ...] = ()
    """Of the step's `score_ids`."""
    failure: GuideFailed | None = None
    """Why the token is -1, where the sequence's guide is the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step drew."""

    drawn: Mapping[int, Drawn]
    """By slot, for the sequences that draw or are scored."""


class PendingStep(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Block until the device is done with this step, and with no later one."""


class Runner(Protocol):
    """One model on one device: runs plans, without policy."""

    max_sequences: int
    """Slots."""
    page_size: int
    """Tokens that a KV page holds."""
    pages: int
    """KV pages that plans may name: ids 0 to `pages` - 1."""
    context_length: int
    vocabulary: int
    memory_bytes: int

    def open(
        self,
        slot: int,
        sampling: SamplingParams,
        prompt_ids: Sequence[int],
        drawn_ids: Sequence[int] = (),
    ) -> None:
        """Give a slot to a sequence.

        Args:
            slot: a free one.
            sampling: how its tokens are drawn.
            prompt_ids: of the request, which penalties look at.
            drawn_ids: what a preempted sequence had drawn before; penalties, `min_tokens` and
                guides count them, and the steps that follow compute them like a prompt.

        Raises:
            EngineError: if this sequence alone is at fault, for example its guide; the slot is
                closed like any other.
        """

    def close(self, slot: int) -> None:
        """Free a slot; the results of all launched steps that name it were waited for."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step; returns before the device is done. Launches run in order."""
