"""How many characters of a text each of its tokens completes; their sums are the tokens' places.

Of a character that is spread over several tokens all start where it does: the last one completes
it.
"""

import codecs
from collections.abc import Sequence

from engine.inference.spelling import TokenText

__all__ = ["AnswerWidths", "widths_in"]

BLANK = b" "
UTF_8 = codecs.getincrementaldecoder("utf-8")


class AnswerWidths:
    """Follows the tokens of one answer, whose text leaves special ones out."""

    def __init__(self) -> None:
        self._decoder = UTF_8("replace")

    def add(self, token: TokenText) -> int:
        """The width of the next token."""
        return 0 if token.is_special else len(self._decoder.decode(bytes(token.bytes)))


def widths_in(text: str, tokens: Sequence[TokenText]) -> list[int]:
    """Find the tokens of a prompt in its text.

    Args:
        text: as it was written. It need not have the special token that opens a prompt, nor the
            blank that some tokenizers put ahead of a first word.
        tokens: all of the text and perhaps more.

    Returns:
        A width for each token, together as long as the text.
    """
    encoded, decoder = text.encode(errors="replace"), UTF_8("replace")
    widths, at, left = list[int](), 0, len(text)
    for token in tokens:
        part = _found_at(encoded, at, token)
        at += len(part)
        widths.append(min(left, len(decoder.decode(part))))
        left -= widths[-1]
    if widths:
        # where a tokenizer rewrites a text its tokens are no parts of it
        widths[-1] += left
    return widths


def _found_at(encoded: bytes, at: int, token: TokenText) -> bytes:
    """What a token stands for at a place of a text."""
    whole = bytes(token.bytes)
    if encoded.startswith(whole, at):
        return whole
    if token.is_special:
        return b""
    word = whole.removeprefix(BLANK)
    return word if encoded.startswith(word, at) else whole
