"""What can be refused before a job is queued or a weight is fetched, and what it would take."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.errors import (
    ConfigRejected,
    DiskTooSmall,
    InvalidRequest,
    ModelTooLarge,
    UnsupportedFormat,
)
from api.hub.base import ModelFacts, ModelHub, PublishTarget, ResolvedModel
from api.hub.names import check_repo_id
from api.hub.texts import evaluation_texts, find_text, hub_text
from api.settings import Settings
from engine.architecture import Architecture
from engine.errors import SpecError
from engine.fit import Estimate, check_spec, estimate_bytes
from engine.spec import QuantSpec

__all__ = ["Preflight", "preflight"]

SOURCE_DTYPES = frozenset({"BF16", "F16", "F32"})
PARAMETER_TOLERANCE = 0.01
"""Config and headers count the same parameters but for buffers that some exports carry."""
# cpu: SmolLM2-135M at w4a8, 8e9 operations for each second of one busy core, two cores;
# cuda: a third of an H100's fp32 peak, not measured
FLOPS = {"cpu": 16e9, "cuda": 20e12}
SECONDS_BASIS = (
    "arithmetic of search and calibration alone, on {device} at {rate:.0e} operations a second"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """A request that can be queued."""

    resolved: ResolvedModel
    architecture: Architecture
    estimate: dict[str, Any]


def preflight(  # noqa: PLR0913 - the fields of one request, by name
    hub: ModelHub,
    settings: Settings,
    *,
    model: str,
    revision: str | None,
    spec: QuantSpec,
    publish: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Preflight:
    """Check a request against the model's config and tensor headers; no side effect.

    Args:
        hub: where the model is.
        settings: limits, folders and local roots.
        model: `owner/name` or `local:<root>/<folder>`.
        revision: branch, tag or commit; None is the default branch.
        spec: what is asked for.
        publish: `repo_id` and `private` of the push, if there is to be one.
        evaluation: its `dataset` and `datasets` are looked for.

    Raises:
        ServiceError: naming the field at fault and what would do.
    """
    target = None if publish is None else PublishTarget.from_json(publish)
    _check_texts(settings, spec, evaluation or {})
    if target is not None:
        _check_target_name(target, model)
    resolved = hub.resolve(model, revision)
    if target is not None:
        _check_publish(hub, resolved, target)
    facts = hub.inspect(resolved)
    architecture = facts.architecture
    _check_size(settings, architecture, facts)
    _check_tensors(architecture, facts)
    try:
        check_spec(architecture, spec)
    except SpecError as error:
        raise InvalidRequest(error.message, param=f"spec.{error.field}") from error
    _check_evaluation(architecture, evaluation or {})
    needs = estimate_bytes(architecture, spec, _device_type(settings))
    estimate = _describe(settings, architecture, facts, needs)
    _check_disk(settings, estimate)
    return Preflight(resolved=resolved, architecture=architecture, estimate=estimate)


def _check_texts(settings: Settings, spec: QuantSpec, evaluation: Mapping[str, Any]) -> None:
    roots = settings.hub.text_roots
    if hub_text(spec.calibration.dataset) is None:
        find_text(roots, spec.calibration.dataset, param="spec.calibration.dataset")
    several = evaluation.get("datasets") or []
    for name in evaluation_texts(evaluation):
        if hub_text(name) is None:
            param = "evaluation.datasets" if name in several else "evaluation.dataset"
            find_text(roots, name, param=param)


def _check_evaluation(architecture: Architecture, evaluation: Mapping[str, Any]) -> None:
    length = evaluation.get("length", 0)
    if evaluation.get("enabled", True) and length > architecture.max_positions:
        raise InvalidRequest(
            f"length = {length} is not possible: the model has {architecture.max_positions}"
            " positions; use at most that",
            param="evaluation.length",
        )


def _check_target_name(target: PublishTarget, model: str) -> None:
    check_repo_id(target.repo_id)
    if target.repo_id.lower() == model.lower():
        raise InvalidRequest(
            f"{target.repo_id} is the source; name another repository", param="publish.repo_id"
        )


def _check_publish(hub: ModelHub, resolved: ResolvedModel, target: PublishTarget) -> None:
    if resolved.gated and not target.private:
        raise InvalidRequest(
            "The source is gated, so its quantization is not pushed publicly; set private.",
            param="publish.private",
        )
    hub.check_target(target)


def _check_size(settings: Settings, architecture: Architecture, facts: ModelFacts) -> None:
    limits = settings.limits
    if architecture.parameter_count > limits.max_parameters:
        raise ModelTooLarge(
            f"The model has {architecture.parameter_count} parameters, the limit is"
            f" {limits.max_parameters}; name a smaller one.",
            param="model",
        )
    if facts.source_bytes > limits.max_source_bytes:
        raise ModelTooLarge(
            f"The model has {facts.source_bytes} bytes, the limit is {limits.max_source_bytes};"
            " name a smaller one.",
            param="model",
        )


def _check_tensors(architecture: Architecture, facts: ModelFacts) -> None:
    foreign = sorted(set(facts.dtypes) - SOURCE_DTYPES)
    if foreign:
        raise UnsupportedFormat(
            f"The weights are stored as {', '.join(foreign)}; name a model stored as"
            f" {', '.join(sorted(SOURCE_DTYPES))}.",
            param="model",
        )
    for linear in architecture.linears:
        part = architecture.find_stored(f"{linear.name}.weight", facts.tensors)
        shape = None if part is None else part.shape(facts.tensors[part.tensor].shape)
        expected = (linear.out_features, linear.in_features)
        if shape != expected:
            held = "no such tensor" if shape is None else f"shape {list(shape)}"
            raise ConfigRejected(
                f"By its config the model has {linear.name}.weight of shape {list(expected)}; its"
                f" files hold {held}.",
                param="model",
            )
    counted, promised = _count_parameters(architecture, facts), architecture.parameter_count
    if abs(counted - promised) > PARAMETER_TOLERANCE * promised:
        raise ConfigRejected(
            f"By its config the model has {promised} parameters; its files hold {counted}.",
            param="model",
        )


def _count_parameters(architecture: Architecture, facts: ModelFacts) -> int:
    # a tied head is the embedding again, though some exports store it twice
    twice = facts.tensors.get(architecture.head_name) if architecture.tied else None
    return facts.parameters - (twice.elements if twice is not None else 0)


def _describe(
    settings: Settings, architecture: Architecture, facts: ModelFacts, estimate: Estimate
) -> dict[str, Any]:
    # the files' own size: a source in fp32 takes twice what its parameters suggest
    needed = facts.source_bytes + estimate.disk_bytes - estimate.source_bytes
    disk = shutil.disk_usage(_existing(settings.work_dir))
    device = _device_type(settings)
    return {
        "parameters": estimate.parameters,
        "layers": architecture.layers,
        "source_bytes": facts.source_bytes,
        "artifact_bytes": estimate.result_bytes,
        "promised_bits_per_weight": estimate.bits_per_weight,
        "disk_needed_bytes": needed,
        "disk_free_bytes": max(0, disk.free - int(settings.limits.disk_reserve * disk.total)),
        "memory_needed_bytes": estimate.memory_bytes,
        "seconds": round(estimate.calibration_flops / FLOPS[device]),
        "seconds_basis": SECONDS_BASIS.format(device=device, rate=FLOPS[device]),
    }


def _device_type(settings: Settings) -> str:
    return "cuda" if (settings.worker.device or "").startswith("cuda") else "cpu"


def _check_disk(settings: Settings, estimate: Mapping[str, Any]) -> None:
    needed, free = estimate["disk_needed_bytes"], estimate["disk_free_bytes"]
    if needed > free:
        raise DiskTooSmall(
            f"The job needs {needed} bytes of disk, {free} are free beside the reserve of"
            f" {settings.limits.disk_reserve:.0%}; free some, or name a smaller model.",
            param="model",
        )


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())
