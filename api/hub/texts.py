"""Texts for calibration and evaluation: the built-in one, or a file below an operator's root."""

from collections.abc import Mapping
from pathlib import Path

from api.errors import InvalidRequest
from api.hub.local import find_below
from api.hub.names import LOCAL_PREFIX, LocalName

__all__ = ["BUILTIN", "find_text"]

BUILTIN = "builtin"
MAX_TEXT_BYTES = 1 << 30


def find_text(roots: Mapping[str, Path], dataset: str, *, param: str) -> Path | None:
    """The file that a data set's name means; None is the text that the engine carries.

    Raises:
        InvalidRequest: naming the field `param` and what would do.
    """
    if dataset == BUILTIN:
        return None
    if not dataset.startswith(LOCAL_PREFIX):
        raise InvalidRequest(
            f"{dataset[:100]!r} is no data set; write {BUILTIN} or local:<root>/<file>",
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
