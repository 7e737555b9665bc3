"""One way to serve a model that is measured, and which ones tell most.

bound = bytes that a step must read / memory rate       weights but for the embedding, and the
                                                        keys and values of every sequence
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.spec import QuantSpec

__all__ = ["CASES", "GOALS", "TOY", "DecodeCase", "Phase"]


class Phase(StrEnum):
    """What is timed."""

    DECODE = "decode"
    """Steps of one token a sequence, behind a prompt."""
    PREFILL = "prefill"
    """The prompt itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """A model of random weights under one load."""

    shape: str
    config: str
    """Bits in the paper's notation, `kv<bits>` of the cache included."""
    head_bits: int | None = None
    batch: int = 1
    context: int = 128
    """Tokens of each prompt."""
    new_tokens: int = 256
    phase: Phase = Phase.DECODE
    goal: float | None = None
    """Tokens a second that the project has set itself."""

    @property
    def spec(self) -> QuantSpec:
        """The quantization."""
        return QuantSpec.from_notation(self.config)

    @property
    def model_key(self) -> tuple[str, str, int | None]:
        """What cases of the same weights have in common."""
        return self.shape, self.config.split("kv")[0], self.head_bits

    @property
    def label(self) -> str:
        """For a person."""
        head = "" if self.head_bits is None else f" head {self.head_bits}"
        return f"{self.phase} {self.shape} {self.config}{head} x{self.batch} at {self.context}"


GOALS: Sequence[DecodeCase] = (
    DecodeCase(shape="llama-7b", config="w2a8", goal=800),
    DecodeCase(shape="llama-7b", config="w4a8", goal=520),
    DecodeCase(shape="llama-7b", config="w4a8", context=2048, phase=Phase.PREFILL, goal=45_000),
    DecodeCase(shape="llama-7b", config="w4a16", goal=500),
    DecodeCase(shape="llama-3-8b", config="w2a8", head_bits=4, goal=700),
    DecodeCase(shape="llama-3-8b", config="w4a8", goal=430),
    DecodeCase(shape="llama-3-8b", config="w4a8kv8", batch=64, context=1024, goal=9_000),
)
"""In an order that makes few models."""
CASES: Sequence[DecodeCase] = (
    *GOALS,
    DecodeCase(shape="llama-3-8b", config="w4a8kv4", batch=64, context=1024),
    DecodeCase(shape="llama-3-8b", config="w4a8kv8", batch=16, context=1024),
    DecodeCase(shape="llama-3-8b", config="w4a8", context=2048, phase=Phase.PREFILL),
    DecodeCase(shape="llama-3-8b", config="w4a8kv8", head_bits=4),
    DecodeCase(shape="llama-7b", config="w2a8", head_bits=8),
    DecodeCase(shape="llama-7b", config="w8a8"),
)
TOY: Sequence[DecodeCase] = (
    DecodeCase(shape="toy", config="w2a8", context=20, new_tokens=6),
    DecodeCase(shape="toy", config="w4a8kv8", head_bits=8, batch=3, context=20, new_tokens=6),
    DecodeCase(shape="toy", config="w4a16", context=40, phase=Phase.PREFILL),
)
