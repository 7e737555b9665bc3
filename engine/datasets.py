"""Names of texts and tasks that measure or calibrate a model; torch-free.

A text is one of the names below or `local:<root>/<file>`, a file below a root that the operator
configured. Who resolves a name to a file is not the engine's business.
"""

from enum import StrEnum

from engine.errors import SpecError

__all__ = ["LOCAL_PREFIX", "TEXT_PATTERN", "TaskFamily", "TextName", "check_text"]

LOCAL_PREFIX = "local:"


class TextName(StrEnum):
    """Texts that have a name of their own."""

    BUILTIN = "builtin"
    """Prose that the engine carries; one text calibrates, another one measures."""
    WIKITEXT2 = "wikitext2"
    """WikiText-2 raw: the train split calibrates, the test split measures."""
    C4 = "c4"
    """The start of the first English shard of the train or of the validation split."""
    PTB = "ptb"
    """Penn Treebank: the train split calibrates, the test split measures."""


class TaskFamily(StrEnum):
    """Zero-shot tasks of the language model evaluation harness."""

    PIQA = "piqa"
    """Which of two ways reaches a goal."""
    ARC = "arc"
    """School science; easy and challenge."""
    BOOLQ = "boolq"
    """Yes or no about a passage."""
    HELLASWAG = "hellaswag"
    """Which of four endings follows."""
    WINOGRANDE = "winogrande"
    """Which of two nouns a pronoun means."""


TEXT_PATTERN = rf"^({'|'.join(TextName)}|{LOCAL_PREFIX}.{{1,200}})$"


def check_text(field: str, name: object) -> None:
    """Refuse what names no text.

    Raises:
        SpecError: naming the field, the value and what would do.
    """
    known = isinstance(name, str) and (name in list(TextName) or name.startswith(LOCAL_PREFIX))
    if not known:
        names = ", ".join(TextName)
        raise SpecError(field, name, f"use {names} or local:<root>/<file>")
