"""What is asked of a model and what it answers, piece by piece; no tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from engine.errors import EngineError
from engine.inference.sampling_params import MAX_BIASES, MAX_TOP_LOGPROBS, Guide, SamplingParams
from engine.inference.steps import MAX_DRAFTS, TokenLogprobs

__all__ = ["FinishReason", "GenerationChunk", "GenerationRequest", "RequestInvalid"]

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 32
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY = 0.01
"""Logits are divided by it: the least there is makes infinities of them."""
MAX_REPETITION_PENALTY = 10.0
MAX_BIAS = 100.0
MAX_ANSWERS = 128
MAX_NAME_LENGTH = 256


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
    min_p: float = 0.0
    """Leaves out tokens less likely than this part of the likeliest."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """Equal seeds give equal texts; None draws one. Answer i of `n` has the seed plus i."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each once, and what is added to their logits."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the generation as the model's own end tokens do."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """Tokens before an end token may come."""
    logprobs: int | None = None
    """How many likeliest tokens to report beside every drawn one; None reports nothing."""
    n: int = 1
    """Answers to the one prompt, told apart by `GenerationChunk.index`."""
    guide: Guide | None = None
    """A language that the answer stays in."""
    draft_tokens: int | None = None
    """How many tokens may be guessed ahead from the text so far; None is the engine's default. Only
    greedy answers are, and never change by it."""
    cache_salt: str | None = None
    """Prompts share cached pages only under equal salts; None is one salt a tenant."""
    tenant: str = ""
    """On whose behalf; tenants take turns where requests wait."""

    def __post_init__(self) -> None:
        for field, is_possible, remedy in (*self._range_checks(), *self._set_checks()):
            if not is_possible:
                value = getattr(self, "prompt_ids" if field == "prompt" else field)
                raise RequestInvalid(
                    field, list(value) if isinstance(value, tuple) else value, remedy
                )

    def sampling(self, seed: int, eos_ids: frozenset[int]) -> SamplingParams:
        """How one answer's tokens are drawn.

        Args:
            seed: 64 bits, of this answer.
            eos_ids: the model's end tokens.
        """
        ends = frozenset() if self.ignore_eos else eos_ids
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            logit_bias=self.logit_bias,
            logprobs=self.logprobs,
            min_tokens=self.min_tokens,
            eos_ids=tuple(sorted(ends | set(self.stop_token_ids))),
            guide=self.guide,
        )

    def _range_checks(self) -> Iterator[tuple[str, bool, str]]:
        """Single numbers; written so that NaN fails too."""
        limit = self.max_tokens
        yield "max_tokens", limit is None or limit >= 1, "use at least 1"
        yield "temperature", 0 <= self.temperature <= MAX_TEMPERATURE, f"use 0 to {MAX_TEMPERATURE}"
        yield "top_p", 0 < self.top_p <= 1, "use more than 0 and at most 1"
        yield "top_k", self.top_k >= 0, "use 0 (all) or more"
        yield "min_p", 0 <= self.min_p <= 1, "use 0 to 1"
        yield (
            "repetition_penalty",
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"use {MIN_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY}",
        )
        for field in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, field)
            yield (
                field,
                -MAX_PENALTY <= penalty <= MAX_PENALTY,
                f"use {-MAX_PENALTY} to {MAX_PENALTY}",
            )
        seed = self.seed
        yield "seed", seed is None or -(2**63) <= seed < 2**63, "use a 64-bit number"
        yield (
            "min_tokens",
            self.min_tokens >= 0 and (limit is None or self.min_tokens <= limit),
            "use 0 to max_tokens",
        )
        top = self.logprobs
        yield (
            "logprobs",
            top is None or 0 <= top <= MAX_TOP_LOGPROBS,
            f"use 0 to {MAX_TOP_LOGPROBS}",
        )
        yield "n", 1 <= self.n <= MAX_ANSWERS, f"use 1 to {MAX_ANSWERS}"
        drafts = self.draft_tokens
        yield "draft_tokens", drafts is None or 0 <= drafts <= MAX_DRAFTS, f"use 0 to {MAX_DRAFTS}"

    def _set_checks(self) -> Iterator[tuple[str, bool, str]]:
        """Lists, names and what does not go together."""
        yield "prompt", bool(self.prompt_ids), "write at least one token"
        yield (
            "stop",
            len(self.stop) <= MAX_STOPS and all(0 < len(s) <= MAX_STOP_LENGTH for s in self.stop),
            f"use up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters",
        )
        yield (
            "stop_token_ids",
            len(self.stop_token_ids) <= MAX_STOP_IDS,
            f"use up to {MAX_STOP_IDS} token ids",
        )
        yield (
            "logit_bias",
            len(self.logit_bias) <= MAX_BIASES
            and len({token_id for token_id, _ in self.logit_bias}) == len(self.logit_bias)
            and all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in self.logit_bias),
            f"use up to {MAX_BIASES} tokens, each once, and {-MAX_BIAS} to {MAX_BIAS}",
        )
        yield (
            "ignore_eos",
            not (self.ignore_eos and self.guide),
            "leave it out: a guided answer ends where its guide does",
        )
        for field in ("cache_salt", "tenant"):
            name = getattr(self, field) or ""
            yield field, len(name) <= MAX_NAME_LENGTH, f"use up to {MAX_NAME_LENGTH} characters"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """Text that became certain, and how far the generation is."""

    text: str
    """May be empty while the next character or a stop string is undecided."""
    completion_tokens: int
    """Tokens generated so far, the ending one included."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk of an answer."""
    index: int = 0
    """Which of the request's `n` answers."""
    token_id: int | None = None
    """The token drawn; None where an answer was cancelled."""
    logprobs: TokenLogprobs | None = None
    """Of that token, where the request asks for them."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the prefix cache."""
    queue_s: float = 0.0
    """Seconds that the answer waited before its first step."""
