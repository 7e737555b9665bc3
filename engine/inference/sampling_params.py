"""How the tokens of one sequence are drawn; no tensors."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "MAX_BIASES",
    "MAX_ENDS",
    "MAX_TOP_LOGPROBS",
    "Guide",
    "GuideKind",
    "SamplingParams",
]

MAX_BIASES = 1024
"""Tokens that `logit_bias` may name."""
MAX_ENDS = 64
"""Tokens that `min_tokens` can hold back."""
MAX_TOP_LOGPROBS = 20
GREEDY_BELOW = 1e-5
"""Temperatures that the kernels take for 0."""


class GuideKind(StrEnum):
    """What the text of a guide is."""

    JSON_SCHEMA = "json_schema"
    """A JSON schema; the answer is a document of it."""
    REGEX = "regex"
    """A regular expression that the whole answer matches; digits and word characters are ASCII."""
    GRAMMAR = "grammar"
    """A context-free grammar in Lark's notation."""
    JSON_OBJECT = "json_object"
    """Nothing: the answer is any JSON object, and the text is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """A language that an answer stays in."""

    kind: GuideKind
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one sequence are drawn; ranges are checked where the request comes in."""

    temperature: float = 1.0
    """Below 1e-5 the likeliest token is taken."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the answer are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that is in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as it is in the answer."""
    seed: int
    """64 bits; with the position of a token it decides the draw."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each once, and what is added to their logits."""
    logprobs: int | None = None
    """How many of the likeliest tokens are reported beside the drawn one; None reports nothing."""
    min_tokens: int = 0
    """Tokens before `eos_ids` may be drawn. A guide outranks it."""
    eos_ids: tuple[int, ...] = ()
    guide: Guide | None = None

    def __post_init__(self) -> None:
        assert len({token_id for token_id, _ in self.logit_bias}) == len(self.logit_bias)
        assert len(self.logit_bias) <= MAX_BIASES
        assert len(self.eos_ids) <= MAX_ENDS
        assert self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS

    @property
    def is_plain(self) -> bool:
        """Whether only temperature, top_k, top_p and min_p matter."""
        return not (
            self.is_penalized
            or self.logit_bias
            or self.min_tokens
            or self.guide is not None
            or self.logprobs is not None
        )

    @property
    def is_penalized(self) -> bool:
        """Whether earlier tokens matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < GREEDY_BELOW

    @property
    def is_limited(self) -> bool:
        """Whether top_k, top_p or min_p leave tokens out."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
