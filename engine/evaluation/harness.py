"""A model of the engine as the language model evaluation harness (`lm-eval`) wants one.

Importing this module needs the extra `eval`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from typing_extensions import override

from engine.evaluation.scoring import Continuation, Scorer

__all__ = ["HarnessModel", "run_tasks"]

METRICS = ("acc", "acc_norm")
SEED = 0


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Scores continuations; it does not generate."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        prefix_token: int,
        on_batch: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._prefix_token = prefix_token
        self._on_batch = on_batch

    @property
    @override
    def eot_token_id(self) -> int:
        """Stands where a context is empty."""
        return self._prefix_token

    @override
    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenize without special tokens, the harness's default for causal models."""
        ids: list[int] = self._tokenizer.encode(string, add_special_tokens=False).ids
        return ids

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        wanted = [
            Continuation(context=tuple(context), continuation=tuple(continuation))
            for _, context, continuation in requests
        ]
        scores = self._scorer.score(wanted, self._on_batch)
        return [(each.log_likelihood, each.is_greedy) for each in scores]

    @override
    def loglikelihood_rolling(self, requests: list[Any], **kwargs: Any) -> list[float]:
        """Score whole texts, each in disjoint windows of the model's context."""
        return [self._score_text(request.args[0]) for request in requests]

    @override
    def generate_until(self, requests: list[Any], **kwargs: Any) -> list[str]:
        """Refuse: tasks that need generated text are not measured.

        Raises:
            ValueError: naming the task.
        """
        names = sorted({str(request.task_name) for request in requests})
        raise ValueError(
            f"{', '.join(names)} asks for generated text; use tasks that score given answers"
        )

    def _score_text(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self._prefix_token,
            max_seq_len=self._scorer.context_length,
            context_len=1,
        )
        wanted = [
            Continuation(context=tuple(context), continuation=tuple(continuation))
            for context, continuation in map(make_disjoint_window, windows)
        ]
        return sum(each.log_likelihood for each in self._scorer.score(wanted, self._on_batch))


def run_tasks(
    model: HarnessModel, tasks: Sequence[str], task_dir: Path | None, limit: int | None
) -> dict[tuple[str, str], tuple[float, int]]:
    """Run tasks without examples in the prompt.

    Args:
        model: what is measured.
        tasks: the harness's own names.
        task_dir: definitions to read instead of the harness's own.
        limit: at most so many examples of each task; None takes all.

    Returns:
        Value and number of examples of each task and metric.
    """
    manager = TaskManager(
        include_path=None if task_dir is None else str(task_dir),
        include_defaults=task_dir is None,
    )
    answer = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=manager,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    return {
        (task, metric): (
            float(values[f"{metric},none"]),
            int(answer["n-samples"][task]["effective"]),
        )
        for task, values in answer["results"].items()
        for metric in METRICS
        if f"{metric},none" in values
    }
