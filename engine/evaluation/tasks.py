"""Zero-shot tasks of source and result through `lm-eval`, an optional stage.

The harness is imported when a task is measured: a machine without it, or without a task's data,
says so in the record of that task.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from tokenizers import Tokenizer

from engine.calibration.dataset import load_tokenizer
from engine.calibration.watch import Watch
from engine.checkpoint.evaluation import TaskScore
from engine.checkpoint.reader import LoadedModel
from engine.datasets import TaskFamily
from engine.errors import CalibrationInterrupted, EvaluationUnavailable
from engine.evaluation.plan import EvaluationPlan
from engine.evaluation.scoring import Scorer
from engine.events import Stage
from engine.models.loading import SourceModel, load_full_precision

__all__ = ["HARNESS_TASKS", "TaskBench"]

HARNESS_TASKS: Mapping[TaskFamily, tuple[str, ...]] = {
    TaskFamily.PIQA: ("piqa",),
    TaskFamily.ARC: ("arc_easy", "arc_challenge"),
    TaskFamily.BOOLQ: ("boolq",),
    TaskFamily.HELLASWAG: ("hellaswag",),
    TaskFamily.WINOGRANDE: ("winogrande",),
}
"""The harness's names of a family's tasks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBench:
    """Source and result in memory, and what the harness needs beside them."""

    source: Scorer
    result: Scorer
    tokenizer: Tokenizer
    prefix_token: int
    plan: EvaluationPlan
    watch: Watch

    @classmethod
    def open(
        cls,
        source: SourceModel,
        loaded: LoadedModel,
        plan: EvaluationPlan,
        watch: Watch,
        device: str,
    ) -> Self:
        """Load the whole source beside the result."""
        folder = source.tensors.directory
        architecture = loaded.architecture
        full = Scorer(
            model=load_full_precision(folder).to(device),
            layers=architecture.layers,
            vocabulary=architecture.vocab,
            context_length=architecture.max_positions,
            device=device,
        )
        return cls(
            source=full,
            result=replace(full, model=loaded.model, kv_bits=loaded.spec.kv_bits),
            tokenizer=load_tokenizer(folder),
            prefix_token=_prefix_token(source.config),
            plan=plan,
            watch=watch,
        )

    def measure(self, family: TaskFamily) -> tuple[TaskScore, ...]:
        """Run a family's tasks on source and result.

        Raises:
            CalibrationInterrupted: if the watch says to stop.
            EvaluationUnavailable: the harness is not installed, or has no data of a task.
        """
        tasks = HARNESS_TASKS[family]
        full, rounded = self._run(self.source, tasks), self._run(self.result, tasks)
        return tuple(
            TaskScore(
                task=task, metric=metric, fp=value, quant=rounded[task, metric][0], examples=count
            )
            for (task, metric), (value, count) in full.items()
        )

    def _run(
        self, scorer: Scorer, tasks: tuple[str, ...]
    ) -> dict[tuple[str, str], tuple[float, int]]:
        try:
            from engine.evaluation.harness import HarnessModel, run_tasks  # noqa: PLC0415
        except ImportError as error:
            raise EvaluationUnavailable(
                f"zero-shot tasks need the extra `eval`, which installs lm-eval ({error})"
            ) from error
        model = HarnessModel(scorer, self.tokenizer, self.prefix_token, self._counter())
        try:
            return run_tasks(model, tasks, self.plan.task_dir, self.plan.task_limit)
        except CalibrationInterrupted:
            raise
        except (OSError, KeyError, ValueError, ImportError) as error:
            log.warning("task_failed", exc_info=error)
            raise EvaluationUnavailable(
                f"{', '.join(tasks)} could not be measured: {type(error).__name__};"
                " the data of a task must be on the machine, which has no network here"
            ) from error

    def _counter(self) -> Callable[[int], None]:
        done = 0

        def count(examples: int) -> None:
            nonlocal done
            done += examples
            # how many there will be is known to the harness alone
            self.watch.progress(Stage.EVALUATING, done, done + 1, "answer")
            self.watch.check()

        return count


def _prefix_token(config: Any) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, list) and token:
            token = token[0]
        if isinstance(token, int):
            return token
    return 0
