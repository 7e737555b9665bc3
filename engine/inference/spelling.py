r"""Single tokens as text and bytes, for log-probabilities; a text's own decoding is elsewhere.

A character outside of the vocabulary is spread over several tokens. Such a token is written as
`bytes:\xe2\x82`, as OpenAI's interface does.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

__all__ = ["Spelling", "TokenText"]

UNDECIDED = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """How a token reads."""

    text: str
    bytes: tuple[int, ...]
    """In UTF-8; of a part of a character, that part."""
    is_special: bool = False
    """Whether it is no text: an answer leaves it out."""


class Spelling:
    """Spells the tokens of one tokenizer, each once. Any thread may ask."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._specials = frozenset(tokenizer.all_special_ids)
        # some decoders drop the blank ahead of a first token: it is read behind another one
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._anchor_text = self._decode([])
        self._spelled: dict[int, TokenText] = {}

    def spell(self, token_id: int) -> TokenText:
        """Write a token; an id without one, as padded vocabularies have, is empty."""
        found = self._spelled.get(token_id)
        if found is None:
            found = self._spelled[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> TokenText:
        name = str(self._tokenizer.convert_ids_to_tokens([token_id])[0] or "")
        if not name:
            return TokenText(text="", bytes=())
        if token_id in self._specials:
            return TokenText(text=name, bytes=tuple(name.encode()), is_special=True)
        text = self._decode([token_id]).removeprefix(self._anchor_text)
        if UNDECIDED not in text:
            return TokenText(text=text, bytes=tuple(text.encode()))
        encoded = _bytes_of(name)
        return TokenText(
            text="bytes:" + "".join(f"\\x{each:02x}" for each in encoded), bytes=encoded
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode([*self._anchor, *ids], skip_special_tokens=False))


def _bytes_of(name: str) -> tuple[int, ...]:
    """Bytes of a token that is no whole text, from its name in the vocabulary."""
    if found := BYTE_TOKEN.fullmatch(name):
        return (int(found[1], 16),)
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in name):
        return tuple(alphabet[character] for character in name)
    return tuple(name.encode())


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write for bytes.

    Printable ones of Latin-1 stand for themselves; the others are moved behind it, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [each for each in range(0x100) if each not in printable]
    moved = {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in printable} | moved
