"""What is measured of a result: each part alone, whatever becomes of the others."""

import builtins

import pytest
import torch

from engine.calibration.watch import Watch
from engine.checkpoint.manifest import read_manifest, verify_directory
from engine.datasets import TaskFamily
from engine.errors import CalibrationInterrupted, SpecError
from engine.evaluation.comparison import evaluate
from engine.evaluation.plan import EvaluationPlan, EvaluationText
from engine.events import EvaluationDivergence, EvaluationFailed, EvaluationResult, Progress
from engine.models.loading import SourceModel
from tests.task_files import GOALS, QUESTIONS, save_tasks
from tests.unit.engine.quantized_models import save_checkpoint

BUILTIN = EvaluationText(name="builtin")
MISSING = EvaluationText(name="c4", error="the Hub did not answer")
# pyarrow and datasets warn about each other's age, the harness about its own habits
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "w3a8g32")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def measure(folder, **plan):
    events = []
    evaluation = evaluate(
        SourceModel.open(folder / "source"),
        folder / "checkpoint",
        EvaluationPlan(**{"windows": 2, "length": 48, **plan}),
        Watch(on_event=events.append),
        "cpu",
    )
    return evaluation, events


def of_type(events, kind):
    return [each for each in events if isinstance(each, kind)]


def test_every_text_is_measured_and_told(folder):
    (folder / "own.txt").write_text("It was the best of times. " * 20)
    own = EvaluationText(name="local:texts/own.txt", path=folder / "own.txt")

    evaluation, events = measure(folder, texts=(BUILTIN, own))

    assert evaluation.status == "succeeded"
    names = [each.dataset for each in evaluation.texts]
    assert names == ["builtin:evaluation.txt", "local:texts/own.txt"]
    assert [each.dataset for each in of_type(events, EvaluationResult)] == names
    assert [each.mean for each in of_type(events, EvaluationDivergence)] == [
        each.divergence.mean for each in evaluation.texts
    ]
    assert len(evaluation.layer_errors) == 2
    assert verify_directory(folder / "checkpoint").evaluation == evaluation
    last = of_type(events, Progress)[-1]
    assert last.done == last.total


def test_a_text_that_is_missing_costs_itself_alone(folder):
    evaluation, events = measure(folder, texts=(MISSING, BUILTIN))

    assert evaluation.status == "partial"
    missing, measured = evaluation.texts
    assert (missing.dataset, missing.status) == ("c4", "failed")
    assert missing.message == "the Hub did not answer"
    assert measured.perplexity.quant > 0
    assert len(evaluation.layer_errors) == 2
    [failed] = of_type(events, EvaluationFailed)
    assert (failed.part, failed.message) == ("c4", "the Hub did not answer")
    assert read_manifest(folder / "checkpoint").evaluation == evaluation


def test_perplexity_alone_is_the_same_perplexity(folder):
    compared, _ = measure(folder, texts=(BUILTIN,))

    alone, events = measure(folder, texts=(BUILTIN,), divergence=False)

    assert alone.perplexity.quant == pytest.approx(compared.perplexity.quant, rel=1e-6)
    assert alone.perplexity.fp == pytest.approx(compared.perplexity.fp, rel=1e-6)
    assert alone.divergence is None
    assert alone.layer_errors == ()
    last = of_type(events, Progress)[-1]
    assert last.done == last.total


def test_a_message_of_the_machine_stays_out_of_the_manifest(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(f"no room in {folder}")

    monkeypatch.setattr("engine.evaluation.comparison.compare_chains", fail)

    evaluation, events = measure(folder, texts=(BUILTIN,))

    assert evaluation.status == "failed"
    assert str(folder) in of_type(events, EvaluationFailed)[0].message
    assert str(folder) not in (folder / "checkpoint" / "abq_manifest.json").read_text()


@pytest.mark.parametrize("kind", [IndexError, ZeroDivisionError, AssertionError, ImportError])
def test_whatever_goes_wrong_with_a_text_costs_that_text_alone(folder, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("of a library")

    monkeypatch.setattr("engine.evaluation.comparison.compare_chains", fail)

    evaluation, events = measure(folder, texts=(BUILTIN,))

    assert evaluation.status == "failed"
    assert kind.__name__ in evaluation.texts[0].message
    assert of_type(events, EvaluationFailed)[0].message == "of a library"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"windows": 0}, "evaluation.windows = 0"),
        ({"length": 1}, "evaluation.length = 1"),
        ({"length": 0}, "evaluation.length = 0"),
    ],
)
def test_a_plan_that_predicts_nothing_is_refused(fields, complaint):
    with pytest.raises(SpecError, match=complaint):
        EvaluationPlan(**fields)

    assert not EvaluationPlan(enabled=False, **fields).enabled


def test_a_stop_is_no_failure(folder):
    watch = Watch(on_event=lambda _: None, should_stop=lambda: True)
    source = SourceModel.open(folder / "source")

    with pytest.raises(CalibrationInterrupted):
        evaluate(source, folder / "checkpoint", EvaluationPlan(windows=1, length=32), watch, "cpu")


def test_zero_shot_tasks_score_source_and_result(folder):
    tasks = (TaskFamily.PIQA, TaskFamily.BOOLQ)

    evaluation, events = measure(
        folder, texts=(BUILTIN,), tasks=tasks, task_dir=save_tasks(folder / "tasks")
    )

    assert evaluation.status == "succeeded"
    scores = {(s.task, s.metric): s for each in evaluation.tasks for s in each.scores}
    assert scores.keys() == {("piqa", "acc"), ("piqa", "acc_norm"), ("boolq", "acc")}
    assert scores["piqa", "acc"].examples == len(GOALS)
    assert scores["boolq", "acc"].examples == len(QUESTIONS)
    # every label of the second task is one answer, and one model gives one answer to all of them
    assert scores["boolq", "acc"].fp in {0, 0.25, 0.5, 0.75, 1}
    told = {(each.dataset, each.metric): each.fp for each in of_type(events, EvaluationResult)}
    assert told["piqa", "acc"] == scores["piqa", "acc"].fp
    assert read_manifest(folder / "checkpoint").evaluation == evaluation


def test_a_task_without_data_costs_itself_alone(folder):
    tasks = (TaskFamily.BOOLQ, TaskFamily.PIQA)

    evaluation, events = measure(
        folder,
        texts=(BUILTIN,),
        tasks=tasks,
        task_dir=save_tasks(folder / "tasks", boolq=False),
    )

    assert evaluation.status == "partial"
    assert [each.status for each in evaluation.tasks] == ["failed", "succeeded"]
    assert "the data of a task must be on the machine" in evaluation.tasks[0].message
    assert [each.part for each in of_type(events, EvaluationFailed)] == ["boolq"]
    assert evaluation.perplexity is not None


def test_a_machine_without_the_harness_says_which_extra_it_lacks(folder, monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *rest):
        if name == "engine.evaluation.harness":
            raise ImportError("No module named 'lm_eval'")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)

    evaluation, _ = measure(folder, texts=(BUILTIN,), tasks=(TaskFamily.PIQA,))

    assert "extra `eval`" in evaluation.tasks[0].message
    assert evaluation.texts[0].status == "succeeded"


def test_a_limit_takes_the_first_examples(folder):
    evaluation, _ = measure(
        folder,
        texts=(),
        tasks=(TaskFamily.PIQA,),
        task_dir=save_tasks(folder / "tasks"),
        task_limit=2,
    )

    assert evaluation.tasks[0].scores[0].examples == 2


def test_accuracies_are_those_of_comparing_likelihoods_by_hand(folder):
    evaluation, _ = measure(
        folder,
        texts=(),
        tasks=(TaskFamily.PIQA,),
        task_dir=save_tasks(folder / "tasks"),
    )

    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    hits = 0
    for row in GOALS:
        context = tokenizer(f"Question: {row['goal']}\nAnswer:").input_ids
        sums = []
        for answer in (row["sol1"], row["sol2"]):
            behind = tokenizer(f" {answer}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([context + behind])).logits[0]
            kept = logits[len(context) - 1 : -1].log_softmax(-1)
            sums.append(float(kept.gather(-1, torch.tensor(behind)[:, None]).sum()))
        hits += int(sums[1] > sums[0]) == row["label"]
    assert evaluation.tasks[0].scores[0].fp == hits / len(GOALS)
