"""Between text and token ids: prompts, chat templates, and text that comes a token at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointInvalid
from engine.inference.request import RequestInvalid
from engine.inference.spelling import Spelling, TokenText

__all__ = ["IncrementalDecoder", "StopFilter", "TextCodec"]

TOKENIZER_NAME = "tokenizer.json"
UNDECIDED = "\N{REPLACEMENT CHARACTER}"
"""What an incomplete UTF-8 sequence decodes to."""
CHARACTER_BYTES = 4
"""Of the longest character in UTF-8: so many bytes may still become one."""
CONTEXT_TOKENS = 8
LONGEST_WINDOW = 32
"""A token costs no more than this, however long nothing whole comes."""


class TextCodec:
    """The tokenizer and chat template of a checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._spelling = Spelling(tokenizer)
        self.eos_ids = eos_ids
        self.vocabulary = len(tokenizer)
        """Tokens that have a text, special ones included."""

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """Read `tokenizer.json` and what stands beside it; no code of the checkpoint is run.

        Raises:
            CheckpointInvalid: if the tokenizer is missing or damaged.
        """
        if not (directory / TOKENIZER_NAME).is_file():
            raise CheckpointInvalid(f"{TOKENIZER_NAME} is missing")
        try:
            # this class reads files only; a tokenizer class named in the config is not imported
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointInvalid(f"{TOKENIZER_NAME} is damaged: {error}") from error
        return cls(tokenizer, _eos_ids(directory, tokenizer.eos_token_id))

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer itself, for what reads its table of tokens."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self._tokenizer.chat_template)

    @property
    def has_tool_template(self) -> bool:
        """Whether the template shows tools to the model."""
        # a template is a program: the name of the variable is all that can be looked for
        return "tools" in str(self._tokenizer.chat_template or "")

    def encode(self, prompt: str, *, with_specials: bool = True) -> tuple[int, ...]:
        """Turn plain text into ids, with the special tokens that open a text."""
        return tuple(self._tokenizer(prompt, add_special_tokens=with_specials)["input_ids"])

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Render messages by the model's template, up to where the assistant answers.

        Args:
            messages: with `role` and `content`, and whatever else the template reads.
            tools: shown to the model; only for a template that has a place for them.

        Raises:
            RequestInvalid: if the model has no template or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise RequestInvalid("messages", "chat", "the model has no chat template; use a prompt")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(each) for each in messages],
                tools=[dict(each) for each in tools] or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program of the model's author
            raise RequestInvalid(
                "messages", "chat", f"the template refuses them: {error}"
            ) from error
        # the template writes the special tokens itself
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, with_specials: bool = False) -> str:
        """Turn ids into text, by default without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not with_specials))

    def spell(self, token_id: int) -> TokenText:
        """Write one token by itself."""
        return self._spelling.spell(token_id)


class IncrementalDecoder:
    """Text of a growing list of tokens; never half a character.

    Args:
        context: what stands before the tokens, whose text is not returned. The text of a token
            depends on its neighbours: many tokenizers drop the space that a text begins with.
    """

    def __init__(self, codec: TextCodec, context: Sequence[int] = ()) -> None:
        self._codec = codec
        self._window = list(context[-CONTEXT_TOKENS:])
        """Tokens that are decoded together, the last one being the newest."""
        self._fresh = 0
        """Tokens behind the last one that ended with a whole character."""
        self._written = len(codec.decode(self._window).rstrip(UNDECIDED))
        """Characters of the window's text that are out."""

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now."""
        self._window.append(token_id)
        self._fresh += 1
        text = self._codec.decode(self._window)
        certain = len(text) - _undecided(text)
        new = text[self._written : certain]
        self._written = max(self._written, certain)
        if new and certain == len(text):
            self._shorten(self._fresh)
            self._fresh = 0
        elif len(self._window) > LONGEST_WINDOW:
            self._shorten(CONTEXT_TOKENS)
        return new

    def finish(self) -> str:
        """Return what is left, complete or not."""
        return self._codec.decode(self._window)[self._written :]

    def _shorten(self, count: int) -> None:
        self._window = self._window[-count:]
        text = self._codec.decode(self._window)
        self._written = len(text) - _undecided(text)


class StopFilter:
    """Passes text on until a stop string appears; holds back what could begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Add text; return what cannot belong to a stop string any more."""
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        keep = len(text) - self._undecided(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Return what was held back: the text ends here, so it begins no stop string."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _undecided(text: str) -> int:
    """How many characters at the end may become others with the next token."""
    return min(len(text) - len(text.rstrip(UNDECIDED)), CHARACTER_BYTES)


def _eos_ids(directory: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Ids that end a turn: of the generation config, else the config; and the tokenizer's."""
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        found = _read_object(directory / name).get("eos_token_id")
        listed = found if isinstance(found, list) else [found]
        ids |= {each for each in listed if isinstance(each, int) and not isinstance(each, bool)}
        if found is not None:
            break
    return frozenset(ids)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{path.name} is no valid JSON") from error
    return record if isinstance(record, dict) else {}
