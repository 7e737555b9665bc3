"""Languages that answers stay in: compiled once, followed a token at a time; no tensors of a model.

A guide becomes a parser over the bytes of the tokens. Before every draw the parser says which
tokens may follow; behind the end of its language only an end token may.
"""

import threading
import time
from collections import OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.errors import GuideFailed
from engine.inference.deep_stack import run_on_deep_stack
from engine.inference.guide_grammars import grammar_of, parsing, refusal, shown
from engine.inference.sampling_params import Guide
from engine.inference.text import TextCodec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["GuideCompiler", "GuideMatcher"]

MAX_COMPILE_S = 1.0
"""Seconds for a parser and its first two masks; who takes more would hold up every step after."""
KEPT = 32
"""Compiled guides kept where nobody says how many requests there may be."""


class GuideCompiler:
    """Compiles guides for the tokens of one model; many threads may use it."""

    def __init__(self, codec: TextCodec, *, kept: int = KEPT) -> None:
        """Compile nothing yet.

        Args:
            codec: of the model.
            kept: compiled guides that stay, those used last; as many as requests run and wait, and
                none of these is compiled again when it starts.
        """
        self._codec, self._kept = codec, max(kept, KEPT)
        self._prototypes: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._turn = threading.Lock()

    @cached_property
    def _trie(self) -> "LLTokenizer":
        """Bytes of all tokens; made for the first guide, a second for 50 000 tokens."""
        from llguidance.hf import from_tokenizer  # noqa: PLC0415  as in `parsing`

        codec = self._codec
        return from_tokenizer(codec.tokenizer, eos_token=sorted(codec.eos_ids) or None)

    def check(self, guide: Guide) -> None:
        """Compile a guide, so that what cannot be followed is refused before it is admitted.

        Raises:
            RequestInvalid: naming the field that holds it, and why.
        """
        self.start(guide)

    def start(self, guide: Guide) -> "GuideMatcher":
        """Begin an answer under a guide; fast for one that was checked.

        Raises:
            RequestInvalid: naming the field that holds it, and why.
        """
        with self._turn:
            if guide in self._prototypes:
                self._prototypes.move_to_end(guide)
                return self._begin(self._prototypes[guide])
        # not in turn: the engine's thread starts answers meanwhile
        prototype = run_on_deep_stack(lambda: self._compile(guide))
        with self._turn:
            self._prototypes[guide] = prototype
            while len(self._prototypes) > self._kept:
                self._prototypes.popitem(last=False)
            return self._begin(prototype)

    def _begin(self, prototype: "LLMatcher") -> "GuideMatcher":
        return GuideMatcher(prototype.deep_copy(), self._trie.vocab_size)

    def _compile(self, guide: Guide) -> "LLMatcher":
        try:
            trie = self._trie
        except (ValueError, RuntimeError) as error:
            raise refusal(
                guide, f"the bytes of this model's tokens are unknown: {error}"
            ) from error
        grammar = grammar_of(guide)
        started_s = time.monotonic()
        matcher: LLMatcher = parsing().LLMatcher(trie, grammar, log_level=0, limits=_limits())
        if reason := self._fault_of(matcher):
            raise refusal(guide, reason)
        if time.monotonic() - started_s > MAX_COMPILE_S:
            raise refusal(
                guide, f"it takes more than {MAX_COMPILE_S} s to compile; make it simpler"
            )
        return matcher

    def _fault_of(self, matcher: "LLMatcher") -> str | None:
        """Why a new parser cannot go on: what is too much work shows at its first two masks."""
        first = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return str(matcher.get_error())
        bits = np.unpackbits(np.frombuffer(first, dtype=np.uint8), bitorder="little")
        ends = self._codec.eos_ids
        following = next((int(each) for each in bits.nonzero()[0] if each not in ends), None)
        if following is None:
            return None
        ahead = matcher.deep_copy()
        if ahead.consume_token(following):
            ahead.compute_bitmask()
        return f"{shown(ahead.get_error())}; make it simpler" if ahead.is_error() else None


class GuideMatcher:
    """Where one answer stands in its guide; used by one thread at a time."""

    def __init__(self, matcher: "LLMatcher", tokens: int) -> None:
        self._matcher = matcher
        self._mask = torch.zeros(-(-tokens // 32), dtype=torch.int32)

    @property
    def is_finished(self) -> bool:
        """Whether only an end token may follow."""
        return bool(self._matcher.is_stopped())

    def fill(self, row_W: torch.Tensor) -> None:  # noqa: N803  shape suffix
        """Write which tokens may follow.

        Args:
            row_W: int32 ``[W]`` on the CPU: a bit for each token of the model, lowest first. Tokens
                that the tokenizer does not know may not follow.

        Raises:
            GuideFailed: if that is too much work; the row allows nothing then.
        """
        row_W.zero_()
        mask = self._mask
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        self._check()
        words = min(len(mask), len(row_W))
        row_W[:words] = mask[:words]

    def accept(self, token_id: int) -> None:
        """Go on by a token that was drawn.

        Raises:
            GuideFailed: if it may not follow.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        # a parser that failed allows the end token, which would pass for an answer
        if self._matcher.is_error():
            reason = shown(self._matcher.get_error())
            raise GuideFailed(
                f"the answer's guide cannot be followed any further: {reason}; make it simpler"
            )


def _limits() -> "LLParserLimits":
    # in milliseconds on one core: 4 or, for the worst expressions tried, 250 before the first
    # mask; 15 for lexer and 3 for parser a mask; and 100 MB of states
    limits: LLParserLimits = parsing().LLParserLimits(
        initial_lexer_fuel=200_000, step_lexer_fuel=200_000, step_max_items=50_000,
        max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False,
    )  # fmt: skip
    return limits
