"""Guides in the notation of the parser's library, and why one cannot be followed; no tensors."""

import json
from types import ModuleType
from typing import assert_never

from engine.inference.request import RequestInvalid
from engine.inference.sampling_params import Guide, GuideKind

__all__ = ["grammar_of", "parsing", "refusal", "shown"]

MAX_TEXT = 1 << 16
"""Characters of a guide. The parser recurses along references, up to 12 KB of stack each, and text
of this length holds up to 2000 of them in a schema and 8000, of 4 KB, in a grammar."""
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
NOTHING = "NoExtensionBias"
"""What the parser says of a language without a text, or without one that ends."""


def grammar_of(guide: Guide) -> str:
    """Say it in the parser's notation.

    Raises:
        RequestInvalid: naming the field that holds it, and why it cannot be read.
    """
    if len(guide.text) > MAX_TEXT:
        raise refusal(guide, f"it has {len(guide.text)} characters, use up to {MAX_TEXT}")
    if not _is_unicode(guide.text):
        raise refusal(guide, "it is no valid Unicode")
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return _json_grammar(guide, guide.text)
        case GuideKind.JSON_OBJECT:
            return _json_grammar(guide, ANY_OBJECT)
        case GuideKind.REGEX:
            # d and w are those of a `pattern` in a schema: ASCII
            expression = parsing().regex_to_lark(guide.text, "dw")
            return str(parsing().LLMatcher.grammar_from_lark(f"start: /{expression}/"))
        case GuideKind.GRAMMAR:
            return str(parsing().LLMatcher.grammar_from_lark(guide.text))
        case _:
            assert_never(guide.kind)


def parsing() -> ModuleType:
    """Load the parser's library, for the first guide: draws without guides run without it."""
    import llguidance  # noqa: PLC0415

    return llguidance


def refusal(guide: Guide, reason: str) -> RequestInvalid:
    """Say which field holds a guide that cannot be followed, and why.

    Args:
        guide: the one at fault.
        reason: in the parser's words or in ours.
    """
    if reason.strip().startswith(NOTHING):
        reason = "no text follows it to an end; write one that some text does"
    # parsers repeat what they were given; it stands in the message once
    if len(guide.text) > MAX_REPEATED:
        reason = reason.replace(guide.text, "...")
    # marks below a line point nowhere in a sentence
    reason = " ".join(word for word in reason.split() if word.strip("^"))
    return RequestInvalid(
        FIELDS[guide.kind],
        shown(guide.text or guide.kind.value),
        f"the {guide.kind.value} cannot be followed: {shown(reason)}",
    )


def shown(text: str) -> str:
    """Write a text in one line, cut where it is long."""
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _json_grammar(guide: Guide, text: str) -> str:
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise refusal(guide, "it is no object")
        return str(
            parsing().LLMatcher.grammar_from_json_schema(
                # a keyword that would not be followed is refused
                text,
                overrides={"whitespace_pattern": WHITESPACE, "lenient": False},
            )
        )
    except RequestInvalid:
        raise
    except (ValueError, RecursionError) as error:
        raise refusal(guide, f"it cannot be read: {error}") from error


def _is_unicode(text: str) -> bool:
    # half a surrogate pair gets through JSON into a str, and no further
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
