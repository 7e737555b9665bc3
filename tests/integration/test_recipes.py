"""Every recipe from source directory to checkpoint, on tiny models of every family."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from engine.calibration import finish as finishing
from engine.calibration.dataset import (
    BuiltinText,
    load_tokenizer,
    read_text,
    sample_windows,
    tokenize,
)
from engine.calibration.watch import Watch
from engine.checkpoint.manifest import Manifest, read_manifest, verify_directory
from engine.checkpoint.reader import load_checkpoint
from engine.errors import CalibrationInterrupted
from engine.evaluation.plan import EvaluationPlan
from engine.events import CheckpointSaved, LayerFinished, LogLine, Progress, Stage, StageStarted
from engine.methods.losses import BlockLoss
from engine.models.loading import load_full_precision
from engine.models.tensors import TensorFiles
from engine.pipeline import QuantJob, quantize_model
from engine.recipe import Clipping, EndToEnd, Ingredients, Rounding, SecondOrder
from engine.spec import CalibrationSpec, QuantSpec, Recipe
from tests.chained import chained_logits, draw_tokens
from tests.tiny_models import save_tiny_model

LAYERS = 2
SMALL = CalibrationSpec(samples=2, length=16, epochs=1, batch=2)
RECIPES = {
    Recipe.RTN: ("llama",),
    Recipe.LWC: ("mixtral",),
    Recipe.OMNIQUANT: ("llama", "opt", "falcon-40b", "gemma2", "phi3", "mixtral"),
    Recipe.DEFAULT: ("falcon-11b",),
    Recipe.FAST: ("falcon-7b", "qwen3"),
    Recipe.ACCURATE: ("llama", "opt-350m", "mixtral", "gemma3_text"),
}
PAIRS = [(recipe, each) for recipe, families in RECIPES.items() for each in families]
LET = Ingredients(equivalent_transform=True, rotation=False, online_hadamard=False)
TUNED = CalibrationSpec(samples=8, length=32, epochs=1, batch=2)
TWO_BITS = {"recipe": Recipe.FAST, "calibration": TUNED, "w_bits": 2, "group_size": 32}


def job_of(source, folder, **fields):
    values = {"w_bits": 3, "a_bits": 8, "calibration": SMALL, **fields}
    return QuantJob(
        source_dir=source,
        out_dir=folder / "out",
        state_dir=folder / "state",
        spec=QuantSpec(**values),
        evaluation=EvaluationPlan(enabled=False),
    )


def quantize(job, should_stop=lambda _: False):
    events = []
    quantize_model(job, Watch(on_event=events.append, should_stop=lambda: should_stop(events)))
    return events


def interrupt(job, should_stop):
    with pytest.raises(CalibrationInterrupted):
        quantize(job, should_stop)


def of_type(events, kind):
    return [each for each in events if isinstance(each, kind)]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@torch.no_grad()
def divergence(directory, source, tokens):
    """Mean over tokens of KL(source || result)."""
    log_q = torch.log_softmax(load_checkpoint(directory).model(tokens).logits, -1)
    log_p = torch.log_softmax(load_full_precision(source)(tokens).logits, -1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(("recipe", "family"), PAIRS, ids=str)
def test_every_recipe_runs_on_its_families(tmp_path, recipe, family):
    source = save_tiny_model(tmp_path / "source", family, layers=1)

    events = quantize(job_of(source, tmp_path, recipe=recipe))

    finished = of_type(events, LayerFinished)
    assert all(each.loss_after <= each.loss_before for each in finished)
    manifest = verify_directory(tmp_path / "out")
    assert manifest.bits.per_weight == manifest.bits.promised_per_weight
    assert not any(each.fell_back for each in manifest.layers)
    loaded, tokens = load_checkpoint(tmp_path / "out"), draw_tokens()
    with torch.no_grad():
        assert torch.equal(chained_logits(loaded, tokens), loaded.model(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gemma2", "falcon-rw", "phi3"])
def test_a_moved_function_reloads_with_its_norms_and_biases(tmp_path, family):
    source = save_tiny_model(tmp_path / "source", family)
    calibration = replace(SMALL, epochs=6, batch=1)
    fields = {"w_bits": 8, "recipe": Recipe.LWC, "ingredients": LET, "calibration": calibration}

    quantize(job_of(source, tmp_path, **fields))

    loaded, tokens = load_checkpoint(tmp_path / "out"), draw_tokens(2)
    source_tensors = TensorFiles.open(source)
    result_tensors = TensorFiles.open(tmp_path / "out")
    common = sorted(set(source_tensors.file_of) & set(result_tensors.file_of))
    before, after = source_tensors.read(common), result_tensors.read(common)
    changed = [
        name for name in common if not torch.equal(before[name], after[name].to(before[name].dtype))
    ]
    assert any("norm" in name or "ln_" in name for name in changed)
    with torch.no_grad():
        logits = loaded.model(tokens).logits
        wanted = load_full_precision(source)(tokens).logits
    assert (logits - wanted).square().mean() < 0.01 * wanted.square().mean()
    one = draw_tokens()
    with torch.no_grad():
        assert torch.equal(chained_logits(loaded, one), loaded.model(one).logits)


def test_rounded_queries_are_the_same_in_calibration_and_in_the_checkpoint(tmp_path):
    source = save_tiny_model(tmp_path / "source")
    fields = {"w_bits": 8, "recipe": Recipe.RTN, "calibration": SMALL}

    quantize(job_of(source, tmp_path / "coarse", q_bits=4, **fields))
    quantize(job_of(source, tmp_path / "fine", **fields))

    coarse = load_checkpoint(tmp_path / "coarse" / "out")
    fine = load_checkpoint(tmp_path / "fine" / "out")
    tokens = draw_tokens()
    with torch.no_grad():
        logits = coarse.model(tokens).logits
        assert torch.equal(chained_logits(coarse, tokens), logits)
        assert not torch.equal(fine.model(tokens).logits, logits)
    losses = [
        read_manifest(tmp_path / each / "out").layers[0].loss_after for each in ("coarse", "fine")
    ]
    assert losses[0] > losses[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a source, and a result that was not tuned end to end."""
    folder = tmp_path_factory.mktemp("plain")
    quantize(job_of(save_tiny_model(folder / "source"), folder, **TWO_BITS))
    return folder


@pytest.mark.parametrize("mode", [EndToEnd.SCALES, EndToEnd.WEIGHTS])
def test_tuning_brings_a_checkpoint_closer_by_what_was_reported(plain, tmp_path, mode):
    source = plain / "source"
    ingredients = Ingredients(end_to_end=mode, end_to_end_epochs=6)

    events = quantize(job_of(source, tmp_path, ingredients=ingredients, **TWO_BITS))

    tuning = read_manifest(tmp_path / "out").tuning
    tokens = calibration_tokens(source)
    folders = {"plain": plain / "out", "tuned": tmp_path / "out"}
    found = {name: divergence(folder, source, tokens) for name, folder in folders.items()}
    assert tuning.divergence_after < 0.95 * tuning.divergence_before
    assert found["plain"] == pytest.approx(tuning.divergence_before, rel=0.05)
    assert found["tuned"] == pytest.approx(tuning.divergence_after, rel=0.05)
    assert read_manifest(folders["plain"]).tuning is None
    steps = [each for each in of_type(events, Progress) if each.stage is Stage.TUNING]
    assert (steps[-1].done, steps[-1].total) == (24, 24)
    codes = [packed_codes(folder) for folder in folders.values()]
    # where they stay, scales alone made the difference
    assert (codes[0] != codes[1]) is (mode is EndToEnd.WEIGHTS)


def packed_codes(folder):
    shard = load_file(folder / "model-00001-of-00001.safetensors")
    return {name: each.tolist() for name, each in shard.items() if name.endswith("weight_packed")}


def calibration_tokens(source):
    text = read_text(None, BuiltinText.CALIBRATION)
    ids = tokenize(load_tokenizer(source), text)
    return sample_windows(text, ids, TUNED.samples, TUNED.length, TUNED.seed).tokens


@pytest.mark.parametrize("mode", [EndToEnd.SCALES, EndToEnd.WEIGHTS])
def test_an_attempt_that_was_cut_off_around_tuning_ends_with_the_same_bytes(tmp_path, mode):
    source = save_tiny_model(tmp_path / "source")
    ingredients = Ingredients(
        end_to_end=mode, end_to_end_epochs=2, equivalent_transform=True, rounding=Rounding.LEARNED
    )
    fields = {"recipe": Recipe.DEFAULT, "ingredients": ingredients, "w_bits": 2, "q_bits": 6}
    whole = job_of(source, tmp_path / "whole", **fields)
    quantize(whole)
    wanted = bytes_of(tmp_path / "whole")

    before = job_of(source, tmp_path / "before", **fields)
    interrupt(before, lambda events: len(of_type(events, CheckpointSaved)) == LAYERS)
    inside = job_of(source, tmp_path / "inside", **fields)
    interrupt(inside, second_step_of_tuning())
    for path in whole.out_dir.iterdir():
        path.unlink()
    events = [quantize(each) for each in (before, inside, whole)]

    for name in ("before", "inside", "whole"):
        assert bytes_of(tmp_path / name) == wanted
    assert all(each.resumed for each in of_type(events[2], LayerFinished))
    assert read_manifest(whole.out_dir).tuning is not None


def second_step_of_tuning():
    """Make a `should_stop` that says yes when the last stage is about to take its second step."""
    asked = []

    def should_stop(events):
        if any(each.stage is Stage.TUNING for each in of_type(events, StageStarted)):
            asked.append(True)
        return len(asked) == 2

    return should_stop


def test_too_little_memory_skips_tuning_and_says_so(tmp_path, monkeypatch):
    source = save_tiny_model(tmp_path / "source")
    monkeypatch.setattr(finishing, "free_bytes", lambda _: 1000)

    events = quantize(job_of(source, tmp_path, recipe=Recipe.DEFAULT))

    said = [each.message for each in of_type(events, LogLine)]
    assert any(each.startswith("no tuning end to end: it needs about") for each in said)
    assert [each.stage for each in of_type(events, StageStarted)][-2:] == [
        Stage.TUNING,
        Stage.PACKING,
    ]
    assert read_manifest(tmp_path / "out").tuning is None


def test_a_block_that_fell_back_is_named_in_the_manifest(tmp_path, monkeypatch):
    source = save_tiny_model(tmp_path / "source")
    calls = []

    def loss(self, outputs):
        calls.append(outputs)
        return (outputs.seen - outputs.wanted).square().mean() * float("nan")

    monkeypatch.setattr(BlockLoss, "__call__", loss)
    events = quantize(job_of(source, tmp_path, recipe=Recipe.LWC))

    manifest = read_manifest(tmp_path / "out")
    assert all(each.fell_back for each in manifest.layers)
    said = [each.message for each in of_type(events, LogLine)]
    assert "model.layers.0: losses were not finite; plain rounding is kept" in said


def test_a_manifest_of_an_earlier_engine_is_read(tmp_path):
    source = save_tiny_model(tmp_path / "source")
    quantize(job_of(source, tmp_path, recipe=Recipe.DEFAULT))
    record = read_manifest(tmp_path / "out").to_json()
    del record["tuning"]
    for layer in record["layers"]:
        del layer["fell_back"]

    manifest = Manifest.from_json(record)

    assert manifest.tuning is None
    assert not any(each.fell_back for each in manifest.layers)


def test_all_ingredients_go_together(tmp_path):
    source = save_tiny_model(tmp_path / "source", "llama")
    ingredients = Ingredients(
        rotation=True,
        online_hadamard=True,
        equivalent_transform=True,
        clipping=Clipping.FACTORS,
        second_order=SecondOrder.GPTAQ,
        rounding=Rounding.TRAINED,
        compensation=True,
        own_input_loss=0.5,
        cosine_loss=0.1,
        attention_loss=0.1,
        end_to_end=EndToEnd.WEIGHTS,
        end_to_end_epochs=1,
    )
    fields = {"q_bits": 6, "kv_bits": 6, "half_step": True, "w_bits": 2, "group_size": 32}

    events = quantize(job_of(source, tmp_path, ingredients=ingredients, **fields))

    assert all(each.loss_after <= each.loss_before for each in of_type(events, LayerFinished))
    assert verify_directory(tmp_path / "out").tuning is not None
    load_checkpoint(tmp_path / "out")
