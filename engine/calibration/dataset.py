"""Windows of tokens out of a text, the same ones for the same text, tokenizer and seed."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.errors import DatasetUnavailable, UnsupportedModel

__all__ = [
    "BuiltinText",
    "Text",
    "TokenWindows",
    "consecutive_windows",
    "load_tokenizer",
    "read_text",
    "sample_windows",
    "tokenize",
]

MAX_TEXT_BYTES = 256 * 1024 * 1024
MAX_TOKENIZER_BYTES = 64 * 1024 * 1024


class BuiltinText(StrEnum):
    """Public-domain prose that the engine carries."""

    CALIBRATION = "calibration.txt"
    """Calibrates when a request names no text."""
    EVALUATION = "evaluation.txt"
    """Measures perplexity when a request names no text; shares no novel with the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text and what identifies it."""

    name: str
    content: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindows:
    """Windows of equal length and the text they come from."""

    tokens: torch.Tensor
    """int64 ``[windows, length]``."""
    text_name: str
    text_sha256: str

    def check_vocabulary(self, vocab: int) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            DatasetUnavailable: naming the text, the token and the vocabulary.
        """
        largest = int(self.tokens.max())
        if largest >= vocab:
            raise DatasetUnavailable(
                f"the text {self.text_name} has the token {largest} and the model's vocabulary"
                f" ends at {vocab - 1}; use another text, or the model's own tokenizer"
            )


def read_text(path: Path | None, builtin: BuiltinText) -> Text:
    """Read a UTF-8 text file, or the builtin text where there is no path.

    Raises:
        DatasetUnavailable: if the file is missing, too large, or no UTF-8.
    """
    if path is None:
        raw = (resources.files("engine.calibration") / "texts" / builtin.value).read_bytes()
        return _as_text(f"builtin:{builtin.value}", raw)
    if not path.is_file():
        raise DatasetUnavailable(f"the text {path.name} does not exist")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise DatasetUnavailable(f"the text {path.name} is larger than {MAX_TEXT_BYTES} bytes")
    return _as_text(path.name, path.read_bytes())


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Load `tokenizer.json`; no class of the repository is run.

    Raises:
        UnsupportedModel: if the file is missing, too large, or broken.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModel("tokenizer.json", "the model has no tokenizer.json")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise UnsupportedModel(
            "tokenizer.json", f"tokenizer.json is larger than {MAX_TOKENIZER_BYTES} bytes"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise UnsupportedModel("tokenizer.json", f"tokenizer.json is broken: {error}") from error
    # a stored truncation or padding would cut the text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: Text) -> torch.Tensor:
    """Tokenize a whole text at once: int64 ``[tokens]``."""
    return torch.tensor(tokenizer.encode(text.content).ids, dtype=torch.int64)


def sample_windows(
    text: Text, ids: torch.Tensor, samples: int, length: int, seed: int
) -> TokenWindows:
    """Cut windows at random places, each place at most once.

    Raises:
        DatasetUnavailable: saying how many tokens the text has and how many are needed.
    """
    places = _places(text, ids, samples, length)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(places, generator=generator)[:samples].sort().values
    tokens = torch.stack([ids[start : start + length] for start in starts.tolist()])
    return TokenWindows(tokens=tokens, text_name=text.name, text_sha256=text.sha256)


def consecutive_windows(
    text: Text, ids: torch.Tensor, windows: int | None, length: int
) -> TokenWindows:
    """Cut windows from the start, without overlap; the ragged end is left out.

    Args:
        text: where the tokens come from.
        ids: int64 ``[tokens]``.
        windows: at most this many; None takes all.
        length: tokens in a window.

    Raises:
        DatasetUnavailable: if the text is shorter than one window.
    """
    _places(text, ids, 1, length)
    count = len(ids) // length if windows is None else min(windows, len(ids) // length)
    tokens = ids[: count * length].view(count, length)
    return TokenWindows(tokens=tokens, text_name=text.name, text_sha256=text.sha256)


def _as_text(name: str, raw: bytes) -> Text:
    try:
        content = raw.decode()
    except UnicodeDecodeError as error:
        raise DatasetUnavailable(f"the text {name} is not UTF-8") from error
    # other systems' line ends would be tokens of their own
    content = content.replace("\r\n", "\n")
    return Text(name=name, content=content, sha256=hashlib.sha256(raw).hexdigest())


def _places(text: Text, ids: torch.Tensor, samples: int, length: int) -> int:
    places = len(ids) - length + 1
    if places < samples:
        raise DatasetUnavailable(
            f"the text {text.name} has {len(ids)} tokens; {samples} windows of {length} tokens"
            f" need at least {length + samples - 1}"
        )
    return places
