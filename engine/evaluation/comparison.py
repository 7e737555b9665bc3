"""Everything that is measured of a result, beside its source and over the same tokens.

Parts are independent: texts one after the other, then zero-shot tasks. What goes wrong in one is
reported and recorded there, and costs neither the artifact nor the other parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from engine.calibration.dataset import (
    BuiltinText,
    Text,
    TokenWindows,
    consecutive_windows,
    load_tokenizer,
    read_text,
    tokenize,
)
from engine.calibration.watch import Watch
from engine.checkpoint.evaluation import (
    Evaluation,
    EvaluationStatus,
    Perplexities,
    TaskMeasurement,
    TextMeasurement,
)
from engine.checkpoint.manifest import record_evaluation
from engine.checkpoint.reader import LoadedModel, load_checkpoint
from engine.datasets import TaskFamily
from engine.errors import CalibrationInterrupted, DatasetUnavailable, EngineError
from engine.evaluation.chain import Chain
from engine.evaluation.divergence import Comparison, as_it_is, compare_chains
from engine.evaluation.perplexity import measure_perplexity
from engine.evaluation.plan import EvaluationPlan, EvaluationText
from engine.evaluation.tasks import TaskBench
from engine.events import (
    EvaluationDivergence,
    EvaluationFailed,
    EvaluationResult,
    Stage,
    StageStarted,
)
from engine.models.blocks import ResidentModel
from engine.models.loading import SourceModel
from engine.modules.rotated import ResidualRotation

__all__ = ["EvaluationPlan", "EvaluationText", "evaluate"]


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
    bench = _Bench(source=source, checkpoint=checkpoint, plan=plan, watch=watch, device=device)
    texts: list[TextMeasurement] = []
    layer_errors: tuple[float, ...] = ()
    for part in range(len(plan.texts)):
        measured = bench.measure_text(part, with_layers=not layer_errors)
        texts.append(measured.record)
        layer_errors = layer_errors or measured.layer_errors
    tasks = [bench.measure_task(family) for family in plan.tasks]
    evaluation = Evaluation.of(texts, tasks, layer_errors)
    record_evaluation(checkpoint, evaluation)
    return evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredText:
    record: TextMeasurement
    layer_errors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Source and result, loaded when the first part needs them."""

    source: SourceModel
    checkpoint: Path
    plan: EvaluationPlan
    watch: Watch
    device: str

    def measure_text(self, part: int, *, with_layers: bool) -> _MeasuredText:
        """Measure one text of the plan; what goes wrong is in the record."""
        wanted = self.plan.texts[part]
        watch = replace(self.watch, part=part, parts=len(self.plan.texts))
        try:
            return self._measure_text(wanted, watch, with_layers=with_layers)
        except CalibrationInterrupted:
            raise
        except Exception as error:  # noqa: BLE001  recorded: the artifact is written and stays
            message = self._report_failure(wanted.label, error)
            record = TextMeasurement(
                dataset=wanted.label, status=EvaluationStatus.FAILED, message=message
            )
            return _MeasuredText(record=record)

    def measure_task(self, family: TaskFamily) -> TaskMeasurement:
        """Measure one family of tasks; what goes wrong is in the record."""
        try:
            scores = self._tasks.measure(family)
        except CalibrationInterrupted:
            raise
        except Exception as error:  # noqa: BLE001  as above
            message = self._report_failure(family.value, error)
            return TaskMeasurement(
                family=family.value, status=EvaluationStatus.FAILED, message=message
            )
        for each in scores:
            self.watch.report(
                EvaluationResult(
                    metric=each.metric,
                    fp=each.fp,
                    quant=each.quant,
                    tokens=each.examples,
                    dataset=each.task,
                )
            )
        return TaskMeasurement(
            family=family.value, status=EvaluationStatus.SUCCEEDED, scores=scores
        )

    def _measure_text(
        self, wanted: EvaluationText, watch: Watch, *, with_layers: bool
    ) -> _MeasuredText:
        windows = self._windows(wanted)
        compared = self._compare(windows, watch) if self.plan.divergence else None
        perplexity = self._perplexities(windows, watch) if compared is None else Perplexities(
            fp=compared.fp.value,
            quant=compared.quant.value,
            tokens=compared.fp.tokens,
            dataset=windows.text_name,
        )  # fmt: skip
        record = TextMeasurement(
            dataset=windows.text_name,
            status=EvaluationStatus.SUCCEEDED,
            text_sha256=windows.text_sha256,
            perplexity=perplexity,
            divergence=None if compared is None else compared.divergence,
        )
        self._report_text(record, perplexity)
        kept = compared.layer_errors if compared is not None and with_layers else ()
        return _MeasuredText(record=record, layer_errors=kept)

    def _windows(self, wanted: EvaluationText) -> TokenWindows:
        if wanted.error is not None:
            raise DatasetUnavailable(wanted.error)
        text = _named(read_text(wanted.path, BuiltinText.EVALUATION), wanted)
        ids = tokenize(load_tokenizer(self.checkpoint), text)
        windows = consecutive_windows(text, ids, self.plan.windows, self.plan.length)
        windows.check_vocabulary(self.source.architecture.vocab)
        return windows

    def _compare(self, windows: TokenWindows, watch: Watch) -> Comparison:
        tokens, kv_bits = windows.tokens, self._loaded.spec.kv_bits
        return compare_chains(
            Chain.start(self.source, tokens, device=self.device),
            Chain.start(self._result, tokens, kv_bits=kv_bits, device=self.device),
            tokens,
            watch,
            _to_source_basis(self._loaded, self.device),
        )

    def _perplexities(self, windows: TokenWindows, watch: Watch) -> Perplexities:
        first = replace(watch, part=2 * watch.part, parts=2 * watch.parts)
        second = replace(first, part=first.part + 1)
        full = measure_perplexity(self.source, windows.tokens, first, device=self.device)
        rounded = measure_perplexity(
            self._result,
            windows.tokens,
            second,
            kv_bits=self._loaded.spec.kv_bits,
            device=self.device,
        )
        return Perplexities(
            fp=full.value, quant=rounded.value, tokens=full.tokens, dataset=windows.text_name
        )

    def _report_text(self, record: TextMeasurement, perplexity: Perplexities) -> None:
        self.watch.report(
            EvaluationResult(
                metric="perplexity",
                fp=perplexity.fp,
                quant=perplexity.quant,
                tokens=perplexity.tokens,
                dataset=record.dataset,
            )
        )
        if record.divergence is not None:
            found = record.divergence
            self.watch.report(
                EvaluationDivergence(
                    dataset=record.dataset,
                    mean=found.mean,
                    p99=found.p99,
                    max=found.max,
                    top1_agreement=found.top1_agreement,
                )
            )

    def _report_failure(self, part: str, error: BaseException) -> str:
        """Tell the whole error; give back what does not differ from machine to machine."""
        said = str(error) or type(error).__name__
        self.watch.report(EvaluationFailed(message=said, part=part))
        is_ours = isinstance(error, EngineError)
        return said if is_ours else f"{type(error).__name__}; the job's events say more"

    @cached_property
    def _loaded(self) -> LoadedModel:
        return load_checkpoint(self.checkpoint, self.device)

    @cached_property
    def _result(self) -> ResidentModel:
        return ResidentModel(architecture=self._loaded.architecture, skeleton=self._loaded.model)

    @cached_property
    def _tasks(self) -> TaskBench:
        return TaskBench.open(self.source, self._loaded, self.plan, self.watch, self.device)


def _named(text: Text, wanted: EvaluationText) -> Text:
    return text if wanted.name is None or wanted.path is None else replace(text, name=wanted.name)


def _to_source_basis(
    loaded: LoadedModel, device: torch.device | str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """How hidden states of a result turn into its source's, where the stream is rotated."""
    if loaded.rotation.seed is None:
        return as_it_is
    return ResidualRotation(loaded.architecture.hidden, loaded.rotation.seed).to(device).inverse
