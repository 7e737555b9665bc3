"""What was measured of a result: every text and task with a status of its own.

One part that fails costs neither the artifact nor the other parts. The record holds nothing that
differs between two equal runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

__all__ = [
    "Divergence",
    "Evaluation",
    "EvaluationStatus",
    "Perplexities",
    "TaskMeasurement",
    "TaskScore",
    "TextMeasurement",
]


class EvaluationStatus(StrEnum):
    """How a measurement, or all of them, ended."""

    SUCCEEDED = "succeeded"
    """Everything that was asked for is recorded."""
    PARTIAL = "partial"
    """Some of it failed; the rest is recorded."""
    FAILED = "failed"
    """It was tried; the artifact is good all the same."""
    SKIPPED = "skipped"
    """Nobody asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexities:
    """Perplexity of source and result over the same tokens."""

    fp: float
    quant: float
    tokens: int
    dataset: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far the result's predictions are from the source's, token by token."""

    mean: float
    """Mean of KL(source || result) over all predicted tokens, in nats."""
    p99: float
    """The 99th percentile: the smallest value that 99 of 100 tokens do not pass."""
    max: float
    top1_agreement: float
    """Share of tokens for which both hold the same one most likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMeasurement:
    """Perplexities and divergence over one text."""

    dataset: str
    status: EvaluationStatus
    message: str = ""
    """Why it failed."""
    text_sha256: str = ""
    perplexity: Perplexities | None = None
    divergence: Divergence | None = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote."""
        perplexity, divergence = record["perplexity"], record["divergence"]
        parts = {
            "status": EvaluationStatus(record["status"]),
            "perplexity": None if perplexity is None else Perplexities(**perplexity),
            "divergence": None if divergence is None else Divergence(**divergence),
        }
        return cls(**{**record, **parts})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    """The harness's own name, for example `arc_easy`."""
    metric: str
    fp: float
    quant: float
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMeasurement:
    """Scores of one family of zero-shot tasks."""

    family: str
    status: EvaluationStatus
    message: str = ""
    """Why it failed."""
    scores: tuple[TaskScore, ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote."""
        scores = tuple(TaskScore(**each) for each in record["scores"])
        return cls(**{**record, "status": EvaluationStatus(record["status"]), "scores": scores})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured of the result."""

    status: EvaluationStatus = EvaluationStatus.SKIPPED
    texts: tuple[TextMeasurement, ...] = ()
    layer_errors: tuple[float, ...] = ()
    """Of every decoder layer: mean square of result less source over mean square of source, at
    its output, over the first text that was measured."""
    tasks: tuple[TaskMeasurement, ...] = ()

    @classmethod
    def of(
        cls,
        texts: Sequence[TextMeasurement],
        tasks: Sequence[TaskMeasurement],
        layer_errors: Sequence[float] = (),
    ) -> Self:
        """Collect parts that were tried."""
        return cls(
            status=_together([*(each.status for each in texts), *(each.status for each in tasks)]),
            texts=tuple(texts),
            layer_errors=tuple(layer_errors),
            tasks=tuple(tasks),
        )

    @property
    def perplexity(self) -> Perplexities | None:
        """Of the first text that was measured."""
        return next((each.perplexity for each in self.texts if each.perplexity is not None), None)

    @property
    def divergence(self) -> Divergence | None:
        """Of the first text that was compared."""
        return next((each.divergence for each in self.texts if each.divergence is not None), None)

    def to_json(self) -> dict[str, Any]:
        """Write every field; `perplexity` stands beside them for readers of one text."""
        measured = self.perplexity
        return {
            "status": self.status.value,
            "perplexity": None if measured is None else asdict(measured),
            "texts": [asdict(each) for each in self.texts],
            "layer_errors": list(self.layer_errors),
            "tasks": [asdict(each) for each in self.tasks],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote, or an earlier engine: a status and one perplexity.

        Raises:
            KeyError: if a field is missing.
            TypeError: if a part has another field.
            ValueError: if a status is none.
        """
        if "texts" not in record:
            return cls(
                status=EvaluationStatus(record["status"]),
                texts=_texts_of_earlier(record["perplexity"]),
            )
        return cls(
            status=EvaluationStatus(record["status"]),
            texts=tuple(TextMeasurement.from_json(each) for each in record["texts"]),
            layer_errors=tuple(float(each) for each in record["layer_errors"]),
            tasks=tuple(TaskMeasurement.from_json(each) for each in record["tasks"]),
        )


def _texts_of_earlier(perplexity: Mapping[str, Any] | None) -> tuple[TextMeasurement, ...]:
    if perplexity is None:
        return ()
    measured = Perplexities(**perplexity)
    return (
        TextMeasurement(
            dataset=measured.dataset, status=EvaluationStatus.SUCCEEDED, perplexity=measured
        ),
    )


def _together(statuses: Sequence[EvaluationStatus]) -> EvaluationStatus:
    if not statuses:
        return EvaluationStatus.SKIPPED
    kinds = set(statuses)
    return kinds.pop() if len(kinds) == 1 else EvaluationStatus.PARTIAL
