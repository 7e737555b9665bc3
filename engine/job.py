"""What to quantize, how, and where everything lies: all that a calibration process is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from engine.calibration.placement import ChainMemory
from engine.evaluation.plan import EvaluationPlan, EvaluationText
from engine.spec import QuantSpec

__all__ = ["QuantJob", "best_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantJob:
    """What to quantize, how, and where everything lies."""

    source_dir: Path
    out_dir: Path
    """Appears complete or not at all; apart from source and state, and empty or an earlier result
    if it exists."""
    state_dir: Path
    """Finished blocks of this and earlier attempts."""
    spec: QuantSpec
    repo: str = "local"
    revision: str = "unknown"
    calibration_text: Path | None = None
    """None takes the builtin text."""
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    device: str = "cpu"
    chain_memory: ChainMemory = field(default_factory=ChainMemory)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read the description that the supervisor writes.

        Raises:
            SpecError: if the spec is not possible.
            KeyError: if a field is missing.
        """
        calibration_text = record.get("calibration_text")
        return cls(
            source_dir=Path(record["source_dir"]),
            out_dir=Path(record["out_dir"]),
            state_dir=Path(record["state_dir"]),
            spec=QuantSpec.from_json(record["spec"]),
            repo=record["source"]["repo"],
            revision=record["source"]["revision"],
            calibration_text=None if calibration_text is None else Path(calibration_text),
            evaluation=EvaluationPlan.from_json(record["evaluation"], _evaluation_texts(record)),
            device=record.get("device") or best_device(),
            chain_memory=ChainMemory.from_json(record.get("chain_memory") or {}),
        )


def best_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _evaluation_texts(record: Mapping[str, Any]) -> tuple[EvaluationText, ...]:
    texts = record.get("evaluation_texts")
    if texts is None:
        # as a supervisor of the version before writes it
        texts = [{"path": record.get("evaluation_text")}]
    return tuple(EvaluationText.from_json(each) for each in texts)
