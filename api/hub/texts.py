"""Texts for calibration and evaluation: built in, of the Hub, or below an operator's root."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from api.errors import InvalidRequest
from api.hub.local import find_below
from api.hub.names import LOCAL_PREFIX, LocalName
from engine.datasets import TextName

__all__ = ["BUILTIN", "evaluation_texts", "find_text", "hub_text"]

BUILTIN = TextName.BUILTIN.value
MAX_TEXT_BYTES = 1 << 30


def evaluation_texts(evaluation: Mapping[str, Any]) -> Sequence[str]:
    """The names of all texts that an evaluation asks for, each once, in order.

    `dataset` names one, `datasets` several; the builtin one is measured where neither does.
    """
    single, several = evaluation.get("dataset", BUILTIN), evaluation.get("datasets") or []
    names = several if single == BUILTIN and several else [single, *several]
    return list(dict.fromkeys(names))


def hub_text(dataset: str) -> TextName | None:
    """The text of the Hub that a data set's name means; None for the others."""
    is_named = dataset in list(TextName) and dataset != BUILTIN
    return TextName(dataset) if is_named else None


def find_text(roots: Mapping[str, Path], dataset: str, *, param: str) -> Path | None:
    """The file that a data set's name means; None is the text that the engine carries.

    Texts of the Hub have no file before a worker has fetched them; ask `hub_text` first.

    Raises:
        InvalidRequest: naming the field `param` and what would do.
    """
    if dataset == BUILTIN:
        return None
    if not dataset.startswith(LOCAL_PREFIX):
        raise InvalidRequest(
            f"{dataset[:100]!r} is no data set; write {', '.join(TextName)} or local:<root>/<file>",
            param=param,
        )
    path = find_below(roots, LocalName(dataset, param=param))
    if path is None or not path.is_file():
        known = ", ".join(sorted(roots)) or "nothing: none is configured"
        raise InvalidRequest(
            f"There is no {dataset}; the operator's roots are called {known}.", param=param
        )
    if not 0 < path.stat().st_size <= MAX_TEXT_BYTES:
        raise InvalidRequest(f"{dataset} is empty or larger than 1 GiB.", param=param)
    return path
