"""What of a result is to be measured: texts, divergence, zero-shot tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from engine.datasets import TaskFamily, TextName
from engine.errors import SpecError
from engine.fields import check_range, read_choice

__all__ = ["EvaluationPlan", "EvaluationText"]

MAX_WINDOWS = 2**31 - 1
MAX_LENGTH = 2**24
"""More than any model has positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationText:
    """One text, found or not."""

    name: str | None = None
    """As the request has it; None takes what the file is called."""
    path: Path | None = None
    """None takes the builtin text."""
    error: str | None = None
    """Why there is no file where there should be one; that text's measurement then fails."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read one entry of a job file."""
        path = record.get("path")
        return cls(
            name=record.get("name"),
            path=None if path is None else Path(path),
            error=record.get("error"),
        )

    @property
    def label(self) -> str:
        """What a failure is reported under."""
        if self.name is not None:
            return self.name
        return TextName.BUILTIN.value if self.path is None else self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """How much of which texts measures source and result."""

    enabled: bool = True
    windows: int = 16
    """At most this many of each text, from its start."""
    length: int = 1024
    """Tokens in a window."""
    texts: tuple[EvaluationText, ...] = (EvaluationText(),)
    divergence: bool = True
    """Also compares predictions token by token, and layer outputs over the first text."""
    tasks: tuple[TaskFamily, ...] = ()
    task_dir: Path | None = None
    """Task definitions that the harness reads instead of its own; for machines without network."""
    task_limit: int | None = None
    """At most so many examples of each task; None takes all."""

    def __post_init__(self) -> None:
        if self.enabled:
            check_range("evaluation.windows", self.windows, 1, MAX_WINDOWS)
            # the first token of a window is given, not predicted
            check_range("evaluation.length", self.length, 2, MAX_LENGTH)

    def check_positions(self, max_positions: int) -> None:
        """Refuse windows that are longer than a model's context.

        Raises:
            SpecError: naming the length and the positions.
        """
        if self.enabled and self.length > max_positions:
            raise SpecError(
                "evaluation.length",
                self.length,
                f"the model has {max_positions} positions; use at most that",
            )

    @classmethod
    def from_json(cls, record: Mapping[str, Any], texts: tuple[EvaluationText, ...]) -> Self:
        """Read the part of a job file that describes the evaluation.

        Raises:
            KeyError: if `enabled`, `windows` or `length` is missing.
            SpecError: naming a task that there is not, or a size that measures nothing.
        """
        task_dir = record.get("task_dir")
        tasks = [
            read_choice("evaluation.tasks", each, TaskFamily) for each in record.get("tasks", ())
        ]
        return cls(
            enabled=record["enabled"],
            windows=record["windows"],
            length=record["length"],
            texts=texts,
            divergence=record.get("divergence", True),
            tasks=tuple(tasks),
            task_dir=None if task_dir is None else Path(task_dir),
            task_limit=record.get("task_limit"),
        )
