"""What a client asks of a quantization, and what it is told about one."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator

from api.db.tables.jobs import Job, JobEvent, JobLayer, JobStatus
from api.schemas.base import Schema
from api.schemas.spec_input import read_spec
from engine.datasets import TEXT_PATTERN, TaskFamily
from engine.errors import SpecError
from engine.events import Stage
from engine.spec import QuantSpec

__all__ = [
    "Estimate",
    "EvaluationOptions",
    "JobEventOut",
    "JobLayerOut",
    "PublishOptions",
    "Quantization",
    "QuantizationRequest",
]

LABELS_MAX = 16
OVERRIDES_MAX = 256
"""In a request; a bit search writes one for every layer."""
TEXTS_MAX = 8

LabelKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$")]
LabelValue = Annotated[str, Field(max_length=200)]


def _limit_overrides(spec: QuantSpec) -> QuantSpec:
    if len(spec.overrides) > OVERRIDES_MAX:
        raise SpecError("overrides", len(spec.overrides), f"use at most {OVERRIDES_MAX}")
    return spec


SpecField = Annotated[
    QuantSpec,
    BeforeValidator(read_spec, json_schema_input_type=str | QuantSpec),
    AfterValidator(_limit_overrides),
]
TextField = Annotated[str, Field(pattern=TEXT_PATTERN)]


class EvaluationOptions(Schema):
    """How the result is measured: beside its source, on the same texts and tasks."""

    enabled: bool = True
    windows: int = Field(default=4, ge=1, le=1024)
    length: int = Field(default=1024, ge=16, le=32768)
    """Tokens in a window."""
    dataset: TextField = "builtin"
    """`builtin`, `wikitext2`, `c4`, `ptb`, or `local:<root>/<file>` below an operator's root."""
    datasets: list[TextField] = Field(default_factory=list, max_length=TEXTS_MAX)
    """Several of the same; each is measured by itself."""
    divergence: bool = True
    """Compares predictions token by token, and the outputs of every layer."""
    tasks: list[TaskFamily] = Field(default_factory=list, max_length=len(TaskFamily))
    """Zero-shot tasks; a stage that fails costs nothing else."""


class PublishOptions(Schema):
    """Where the result is pushed when it is complete."""

    repo_id: str = Field(pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$")
    private: bool = True


class QuantizationRequest(Schema):
    """A model and the bits it should have."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "spec": "w4a8"},
                {"model": "local:models/smollm2", "spec": {"w_bits": 3, "group_size": 64}},
                {
                    "model": "local:models/smollm2",
                    "spec": {"w_bits": 4, "a_bits": 8, "target": {"average_bits": 3.5}},
                },
            ]
        }
    )

    model: str = Field(min_length=3, max_length=200)
    """`owner/name` on the Hub, or `local:<root>/<folder>` below a root the operator configured."""
    revision: str | None = Field(default=None, max_length=100)
    """Branch, tag or commit; none is the default branch. The job pins the commit it resolves to."""
    spec: SpecField
    """`w4a8`, `w2*a8`, `w4a16g64`, `w4a8kv8`, or every field written out."""
    evaluation: EvaluationOptions = EvaluationOptions()
    publish: PublishOptions | None = None
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=LABELS_MAX)

    @field_validator("model", mode="after")
    @classmethod
    def _refuse_urls(cls, model: str) -> str:
        if "://" in model or model.startswith(("/", "~")) or "\\" in model:
            raise ValueError("write owner/name or local:<root>/<folder>, no address and no path")
        return model


class Estimate(Schema):
    """What a quantization would need and give."""

    object: Literal["quantization.estimate"] = "quantization.estimate"
    model: str
    source_sha: str
    """The revision that the request resolves to now."""
    notation: str
    architecture: str
    parameters: int
    layers: int
    source_bytes: int
    """What is downloaded."""
    artifact_bytes: int
    promised_bits_per_weight: float
    """Of the quantized layers, scales and zero-points included, embeddings excluded."""
    disk_needed_bytes: int
    disk_free_bytes: int
    memory_needed_bytes: int
    seconds: int
    """Rough; `seconds_basis` says what was counted."""
    seconds_basis: str


class Quantization(Schema):
    """One job: what was asked, where it is, and what came out."""

    object: Literal["quantization"] = "quantization"
    id: str
    status: JobStatus
    stage: Stage | None
    model: str
    revision: str | None
    source_sha: str
    spec: dict[str, Any]
    notation: str
    evaluation: dict[str, Any]
    publish: dict[str, Any] | None
    labels: dict[str, Any]
    estimate: dict[str, Any]
    progress: dict[str, Any] | None
    report: dict[str, Any] | None
    error: dict[str, Any] | None
    artifact_id: str | None
    attempt: int
    max_attempts: int
    retry_of: str | None
    created_at: datetime
    started_at: datetime | None
    cancelled_at: datetime | None
    succeeded_at: datetime | None
    failed_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> Self:
        """Show a job."""
        names = [each for each in cls.model_fields if each not in {"object", "notation"}]
        values = {name: getattr(job, name) for name in names}
        return cls(**values, notation=QuantSpec.from_json(job.spec).notation)


class JobEventOut(Schema):
    """Something that happened to a job; ids grow and never change."""

    object: Literal["quantization.event"] = "quantization.event"
    id: str
    type: str
    attempt: int
    data: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, event: JobEvent) -> Self:
        """Show an event."""
        return cls(
            id=str(event.id),
            type=event.type,
            attempt=event.attempt,
            data=event.data,
            created_at=event.created_at,
        )


class JobLayerOut(Schema):
    """How one decoder layer was quantized; losses are mean squared errors of its output."""

    object: Literal["quantization.layer"] = "quantization.layer"
    id: str
    index: int
    name: str
    bits: dict[str, Any]
    loss_before: float | None
    loss_after: float | None
    seconds: float | None
    memory_bytes: int | None
    resumed: bool

    @classmethod
    def of(cls, layer: JobLayer) -> Self:
        """Show a layer."""
        names = [each for each in cls.model_fields if each not in {"object", "id"}]
        return cls(id=layer.name, **{name: getattr(layer, name) for name in names})
