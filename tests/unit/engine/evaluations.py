"""An evaluation in which one text and one task succeeded and one of each failed."""

from engine.checkpoint.evaluation import (
    Divergence,
    Evaluation,
    EvaluationStatus,
    Perplexities,
    TaskMeasurement,
    TaskScore,
    TextMeasurement,
)

SUCCEEDED, FAILED = EvaluationStatus.SUCCEEDED, EvaluationStatus.FAILED


def an_evaluation():
    measured = TextMeasurement(
        dataset="wikitext2",
        status=SUCCEEDED,
        text_sha256="a" * 64,
        perplexity=Perplexities(fp=20.5, quant=22.25, tokens=4096, dataset="wikitext2"),
        divergence=Divergence(mean=0.02, p99=0.5, max=3.0, top1_agreement=0.9375),
    )
    missing = TextMeasurement(dataset="c4", status=FAILED, message="the Hub did not answer")
    score = TaskScore(task="piqa", metric="acc", fp=0.5, quant=0.25, examples=4)
    return Evaluation.of(
        [measured, missing],
        [
            TaskMeasurement(family="piqa", status=SUCCEEDED, scores=(score,)),
            TaskMeasurement(family="boolq", status=FAILED, message="no data"),
        ],
        layer_errors=[0.001, 0.002],
    )
