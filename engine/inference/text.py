"""Between text and token ids: prompts, chat templates, and text that comes a token at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointInvalid
from engine.inference.request import MAX_STOP_IDS, RequestInvalid
from engine.inference.sampling_params import MAX_ENDS
from engine.inference.spelling import Spelling, TokenText

__all__ = ["IncrementalDecoder", "StopFilter", "TextCodec"]

TOKENIZER_NAME = "tokenizer.json"
UNDECIDED = "\N{REPLACEMENT CHARACTER}"
"""What an incomplete UTF-8 sequence decodes to."""
CONTEXT_TOKENS = 8
MOST_ENDS = MAX_ENDS - MAX_STOP_IDS
"""Tokens that end a turn: a request may name more."""
MOST_WAITING = 16
"""Tokens that may wait for a whole character, so that none costs more than another."""


class TextCodec:
    """The tokenizer and chat template of a checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._spelling = Spelling(tokenizer)
        self.eos_ids = eos_ids
        self.special_ids = frozenset(tokenizer.all_special_ids)
        """Tokens without a text in what is answered."""
        self.vocabulary = len(tokenizer)
        """Tokens that have a text, special ones included."""

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """Read `tokenizer.json` and what stands beside it; no code of the checkpoint is run.

        Raises:
            CheckpointInvalid: if the tokenizer is missing or damaged, or too many tokens are ends.
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
            depends on its neighbours: many tokenizers drop the blank that a text begins with.
    """

    def __init__(self, codec: TextCodec, context: Sequence[int] = ()) -> None:
        self._codec = codec
        # tokens whose text is out, as far as the next ones need them, then those that wait: text
        # is written where a token ends with a whole character. All are decoded together, since a
        # tokenizer may spell bytes out as unknown until the last one of their run has come
        self._window = [each for each in context[-CONTEXT_TOKENS:] if each not in codec.special_ids]
        self._out = len(self._window)
        # a character that the context only begins is the answer's, if it goes on
        while self._out and codec.decode(self._window[: self._out]).endswith(UNDECIDED):
            self._out -= 1
        self._has_begun = self._out < len(self._window)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now."""
        if token_id in self._codec.special_ids:
            return ""
        self._window.append(token_id)
        # a character takes four tokens at most: what goes on beyond that is none
        return self._advance(is_final=len(self._window) - self._out >= MOST_WAITING)

    def finish(self) -> str:
        """Return what is left, complete or not."""
        return self._advance(is_final=True)

    def _advance(self, *, is_final: bool) -> str:
        shown = self._codec.decode(self._window[: self._out])
        text = self._codec.decode(self._window)
        if not is_final and (len(text) <= len(shown) or text.endswith(UNDECIDED)):
            return ""
        self._window = self._window[self._out :]
        self._out = len(self._window)
        new = text[len(shown) :]
        if self._has_begun:
            new = new.lstrip(UNDECIDED)
            self._has_begun = False
        return new


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


def _eos_ids(directory: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Ids that end a turn: of the generation config, else the config; and the tokenizer's."""
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    config = _read_object(directory / "config.json")
    for record in (_read_object(directory / "generation_config.json"), config):
        found = record.get("eos_token_id")
        listed = found if isinstance(found, list) else [found]
        ids |= {each for each in listed if isinstance(each, int) and not isinstance(each, bool)}
        if found is not None:
            break
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int):
        # the model never draws what it has no row for
        ids = {each for each in ids if 0 <= each < vocabulary}
    if len(ids) > MOST_ENDS:
        raise CheckpointInvalid(
            f"eos_token_id names {len(ids)} tokens: use up to {MOST_ENDS} in generation_config.json"
        )
    return frozenset(ids)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{path.name} is no valid JSON") from error
    return record if isinstance(record, dict) else {}
