"""What the engine reports while it works; torch-free. One event is one JSON object on one line."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol

__all__ = [
    "ArtifactFile",
    "BitsChosen",
    "CheckpointSaved",
    "EvaluationDivergence",
    "EvaluationFailed",
    "EvaluationResult",
    "Event",
    "EventSink",
    "LayerFinished",
    "LayerStarted",
    "LogLine",
    "Progress",
    "Stage",
    "StageStarted",
    "encode_event",
]


class Stage(StrEnum):
    """Where a job is while it runs, in order."""

    VALIDATING = "validating"
    """Checks what was asked against the model's config and tensor headers."""
    DOWNLOADING = "downloading"
    """Fetches the source model at its pinned revision."""
    SEARCHING = "searching"
    """Measures every layer at every width and chooses its bits; only with a target."""
    CALIBRATING = "calibrating"
    """Learns and rounds one decoder layer after the other."""
    TUNING = "tuning"
    """Tunes the whole quantized model against the full-precision logits."""
    PACKING = "packing"
    """Writes packed tensors and the manifest."""
    EVALUATING = "evaluating"
    """Measures the result against the source."""
    UPLOADING = "uploading"
    """Moves the artifact to the store and, where asked, to the Hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage began."""

    type: ClassVar[str] = "stage.started"
    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsChosen:
    """The bit search is done; calibration takes these."""

    type: ClassVar[str] = "bits.chosen"
    average_bits: float
    """Stored bits per quantized weight."""
    predicted_loss: float
    """KL divergence of the logits before calibration, in nats per token."""
    bits: dict[str, tuple[int, int]]
    """Weight and activation bits of every linear by its full name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStarted:
    """Calibration of a decoder layer began."""

    type: ClassVar[str] = "layer.started"
    index: int
    total: int
    name: str
    bits: dict[str, int]
    """Weight bits of each linear in the layer, by its name inside the layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFinished:
    """A decoder layer is quantized; losses are mean squared errors of its output."""

    type: ClassVar[str] = "layer.finished"
    index: int
    total: int
    name: str
    loss_before: float
    """Error of plain rounding to nearest."""
    loss_after: float
    """Error of what was kept, never above `loss_before`."""
    seconds: float
    memory_bytes: int
    """Peak memory: of the GPU where there is one, else resident memory of the process."""
    resumed: bool = False
    """True when the layer came from a checkpoint of an earlier attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """The layer's result is on disk; a later attempt starts behind it."""

    type: ClassVar[str] = "checkpoint.saved"
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """One metric of the full-precision source and of the quantized result."""

    type: ClassVar[str] = "eval.result"
    metric: str
    fp: float
    quant: float
    tokens: int
    """Tokens that were predicted; of a task, its examples."""
    dataset: str = ""
    """The text or the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationDivergence:
    """How far the result's predictions are from the source's, over the tokens of a text."""

    type: ClassVar[str] = "eval.divergence"
    dataset: str
    mean: float
    """Mean divergence of a token, in nats."""
    p99: float
    max: float
    top1_agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFailed:
    """A part of the optional evaluation failed; the artifact and the other parts stay."""

    type: ClassVar[str] = "eval.failed"
    message: str
    part: str = ""
    """The text or the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """A file of the artifact is complete."""

    type: ClassVar[str] = "artifact.file"
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a countable piece of work is; at most two a second."""

    type: ClassVar[str] = "progress"
    stage: Stage
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A sentence for the person who watches."""

    type: ClassVar[str] = "log"
    level: str
    message: str


Event = (
    StageStarted
    | BitsChosen
    | LayerStarted
    | LayerFinished
    | CheckpointSaved
    | EvaluationResult
    | EvaluationDivergence
    | EvaluationFailed
    | ArtifactFile
    | Progress
    | LogLine
)


class EventSink(Protocol):
    """Takes events as they happen."""

    def __call__(self, event: Event, /) -> None:
        """Record one event; must not block for long."""


def encode_event(event: Event) -> str:
    """Write an event as one line of JSON without the newline: its fields and its `type`."""
    fields: dict[str, Any] = {"type": event.type, **asdict(event)}
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)
