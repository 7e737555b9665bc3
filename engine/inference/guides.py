"""Languages that answers stay in: compiled once, followed a token at a time; no tensors of a model.

A guide becomes a parser over the bytes of the tokens. Before every draw the parser says which
tokens may follow; behind the end of its language only an end token may.
"""

import json
import threading
import time
from collections import OrderedDict
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, assert_never

import torch

from engine.errors import EngineError
from engine.inference.deep_stack import run_on_deep_stack
from engine.inference.request import RequestInvalid
from engine.inference.sampling_params import Guide, GuideKind
from engine.inference.text import TextCodec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["GuideCompiler", "GuideFailed", "GuideMatcher"]

MAX_TEXT = 1 << 16
"""Characters of a guide. The parser recurses along references, up to 12 KB of stack each, and text
of this length holds up to 2000 of them in a schema and 8000, of 4 KB, in a grammar."""
MAX_COMPILE_S = 1.0
"""Seconds for a parser and its first mask; who takes more would hold up every step after."""
CACHED = 32
"""Compiled guides kept for requests that repeat one."""
MAX_SHOWN = 200
"""Characters of a guide or a reason in a message."""
MAX_REPEATED = 20
"""Characters of a guide that a reason may repeat."""
FIELDS = {
    GuideKind.JSON_SCHEMA: "response_format",
    GuideKind.JSON_OBJECT: "response_format",
    GuideKind.REGEX: "guided_regex",
    GuideKind.GRAMMAR: "guided_grammar",
}
WHITESPACE = r"[ \n\r\t]{0,32}"
"""Between the parts of a JSON text: a small model that may write spaces without end does so."""
ANY_OBJECT = '{"type": "object"}'


class GuideFailed(EngineError):
    """The guide of a running answer cannot be followed any further."""

    code: ClassVar[str] = "guide_failed"


class GuideCompiler:
    """Compiles guides for the tokens of one model; many threads may use it."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._prototypes: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._turn = threading.Lock()

    @cached_property
    def _trie(self) -> "LLTokenizer":
        """Bytes of all tokens; made for the first guide, a second for 50 000 tokens."""
        from llguidance.hf import from_tokenizer  # noqa: PLC0415  as in `_parsing`

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
            while len(self._prototypes) > CACHED:
                self._prototypes.popitem(last=False)
            return self._begin(prototype)

    def _begin(self, prototype: "LLMatcher") -> "GuideMatcher":
        return GuideMatcher(prototype.deep_copy(), self._trie.vocab_size)

    def _compile(self, guide: Guide) -> "LLMatcher":
        if len(guide.text) > MAX_TEXT:
            raise _refusal(guide, f"it has {len(guide.text)} characters, use up to {MAX_TEXT}")
        if not _is_unicode(guide.text):
            raise _refusal(guide, "it is no valid Unicode")
        try:
            trie = self._trie
        except (ValueError, RuntimeError) as error:
            raise _refusal(
                guide, f"the bytes of this model's tokens are unknown: {error}"
            ) from error
        grammar = _grammar(guide)
        started_s = time.monotonic()
        matcher: LLMatcher = _parsing().LLMatcher(trie, grammar, log_level=0, limits=_limits())
        if not matcher.is_error():
            # what is too much work shows at the first mask
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(guide, matcher.get_error())
        if time.monotonic() - started_s > MAX_COMPILE_S:
            raise _refusal(
                guide, f"it takes more than {MAX_COMPILE_S} s to compile; make it simpler"
            )
        return matcher


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
            raise GuideFailed(f"{GuideFailed.__doc__} {_shown(self._matcher.get_error())}")


def _parsing() -> ModuleType:
    """The parser's library, loaded for the first guide: draws without guides run without it."""
    import llguidance  # noqa: PLC0415

    return llguidance


def _limits() -> "LLParserLimits":
    # in milliseconds on one core: 4 or, for the worst expressions tried, 250 before the first
    # mask; 15 for lexer and 3 for parser a mask; and 100 MB of states
    limits: LLParserLimits = _parsing().LLParserLimits(
        initial_lexer_fuel=200_000, step_lexer_fuel=200_000, step_max_items=50_000,
        max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False,
    )  # fmt: skip
    return limits


def _grammar(guide: Guide) -> str:
    """Say it in the parser's notation."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return _json_grammar(guide, guide.text)
        case GuideKind.JSON_OBJECT:
            return _json_grammar(guide, ANY_OBJECT)
        case GuideKind.REGEX:
            # d and w are those of a `pattern` in a schema: ASCII
            expression = _parsing().regex_to_lark(guide.text, "dw")
            return str(_parsing().LLMatcher.grammar_from_lark(f"start: /{expression}/"))
        case GuideKind.GRAMMAR:
            return str(_parsing().LLMatcher.grammar_from_lark(guide.text))
        case _:
            assert_never(guide.kind)


def _json_grammar(guide: Guide, text: str) -> str:
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise _refusal(guide, "it is no object")
        return str(
            _parsing().LLMatcher.grammar_from_json_schema(
                # a keyword that would not be followed is refused
                text,
                overrides={"whitespace_pattern": WHITESPACE, "lenient": False},
            )
        )
    except RequestInvalid:
        raise
    except (ValueError, RecursionError) as error:
        raise _refusal(guide, f"it cannot be read: {error}") from error


def _is_unicode(text: str) -> bool:
    # half a surrogate pair gets through JSON into a str, and no further
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(guide: Guide, reason: str) -> RequestInvalid:
    # parsers repeat what they were given; it stands in the message once
    if len(guide.text) > MAX_REPEATED:
        reason = reason.replace(guide.text, "...")
    # marks below a line point nowhere in a sentence
    reason = " ".join(word for word in reason.split() if word.strip("^"))
    return RequestInvalid(
        FIELDS[guide.kind],
        _shown(guide.text or guide.kind.value),
        f"the {guide.kind.value} cannot be followed: {_shown(reason)}",
    )


def _shown(text: str) -> str:
    """One line of a text."""
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
