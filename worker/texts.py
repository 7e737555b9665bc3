"""The texts of the Hub that a job names, on local disk before the calibration process starts.

Without the text that calibrates there is no job; one that only measures is told as missing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from api.db.tables.jobs import Job
from api.errors import ServiceError
from api.hub.base import TextSource, TextUse
from api.hub.texts import BUILTIN, evaluation_texts, hub_text
from engine.datasets import TextName
from engine.errors import DatasetUnavailable

__all__ = ["fetch_calibration", "fetch_evaluation", "text_path"]

Check = Callable[[], None]
"""Raises to end a transfer."""


def text_path(folder: Path, name: TextName, use: TextUse) -> Path:
    """Where a text of the Hub is once it is fetched."""
    return folder / f"{name}-{use}.txt"


def fetch_calibration(source: TextSource, job: Job, folder: Path, check: Check) -> None:
    """Bring the text that calibrates, unless it is there or is none of the Hub's.

    Raises:
        DatasetUnavailable: it cannot be had.
        HubUnavailable: the Hub did not answer.
    """
    name = hub_text(job.spec.get("calibration", {}).get("dataset", BUILTIN))
    if name is not None:
        _fetch(source, name, TextUse.CALIBRATION, folder, check)


def fetch_evaluation(
    source: TextSource,
    job: Job,
    folder: Path,
    insist: Callable[[Callable[[Check], None]], None],
) -> Mapping[str, str]:
    """Bring the texts that measure; give back why some could not be had, by their names.

    Args:
        source: where they come from.
        job: which texts are wanted.
        folder: where they go; what is there already is kept.
        insist: calls what it is given, again where that may help.
    """
    missing = {}
    names = evaluation_texts(job.evaluation) if job.evaluation.get("enabled", True) else []
    for name in filter(None, map(hub_text, names)):
        try:
            insist(
                lambda check, name=name: _fetch(  # type: ignore[misc]  # mypy loses the default
                    source, name, TextUse.EVALUATION, folder, check
                )
            )
        except (ServiceError, DatasetUnavailable) as error:
            missing[name.value] = error.message
    return missing


def _fetch(source: TextSource, name: TextName, use: TextUse, folder: Path, check: Check) -> None:
    path = text_path(folder, name, use)
    # a text that is there is whole
    if not path.is_file():
        source.fetch(name, use, path, check)
