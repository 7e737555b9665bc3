"""Perplexity of a source and of its checkpoint over the same tokens, written into the manifest."""

from dataclasses import dataclass, replace
from pathlib import Path

from engine.calibration.dataset import (
    BuiltinText,
    consecutive_windows,
    load_tokenizer,
    read_text,
    tokenize,
)
from engine.calibration.watch import Watch
from engine.checkpoint.manifest import (
    Evaluation,
    EvaluationStatus,
    Perplexities,
    record_evaluation,
)
from engine.checkpoint.reader import load_checkpoint
from engine.errors import CalibrationInterrupted, EngineError
from engine.evaluation.perplexity import measure_perplexity
from engine.events import EvaluationFailed, EvaluationResult, Stage, StageStarted
from engine.models.blocks import ResidentModel
from engine.models.loading import SourceModel

__all__ = ["EvaluationPlan", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """How much of a text measures source and result."""

    enabled: bool = True
    windows: int = 16
    """At most this many, from the start of the text."""
    length: int = 1024
    """Tokens in a window."""
    text: Path | None = None
    """None takes the builtin text."""


def evaluate(
    source: SourceModel, checkpoint: Path, plan: EvaluationPlan, watch: Watch, device: str
) -> Evaluation:
    """Measure both and add the result to the checkpoint's manifest.

    The checkpoint is loaded anew from its files. What goes wrong here never costs the artifact:
    it is reported and recorded.

    Raises:
        CalibrationInterrupted: if the watch says to stop.
    """
    if not plan.enabled:
        return Evaluation()
    watch.report(StageStarted(stage=Stage.EVALUATING))
    try:
        measured = _measure(source, checkpoint, plan, watch, device)
    except CalibrationInterrupted:
        raise
    except (EngineError, ValueError, RuntimeError, MemoryError, OSError) as error:
        watch.report(EvaluationFailed(message=str(error) or type(error).__name__))
        evaluation = Evaluation(status=EvaluationStatus.FAILED)
    else:
        evaluation = Evaluation(status=EvaluationStatus.SUCCEEDED, perplexity=measured)
        watch.report(
            EvaluationResult(
                metric="perplexity", fp=measured.fp, quant=measured.quant, tokens=measured.tokens
            )
        )
    record_evaluation(checkpoint, evaluation)
    return evaluation


def _measure(
    source: SourceModel, checkpoint: Path, plan: EvaluationPlan, watch: Watch, device: str
) -> Perplexities:
    text = read_text(plan.text, BuiltinText.EVALUATION)
    ids = tokenize(load_tokenizer(checkpoint), text)
    tokens = consecutive_windows(text, ids, plan.windows, plan.length).tokens
    full = measure_perplexity(source, tokens, replace(watch, part=0, parts=2), device=device)
    loaded = load_checkpoint(checkpoint, device)
    resident = ResidentModel(architecture=loaded.architecture, skeleton=loaded.model)
    rounded = measure_perplexity(
        resident,
        tokens,
        replace(watch, part=1, parts=2),
        kv_bits=loaded.spec.kv_bits,
        device=device,
    )
    return Perplexities(fp=full.value, quant=rounded.value, tokens=full.tokens, dataset=text.name)
