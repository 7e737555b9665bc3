"""A rotated calibration from source directory to text, and what it stores."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.calibration.capture import capture_inputs
from engine.calibration.watch import Watch
from engine.checkpoint.reader import load_checkpoint
from engine.errors import CalibrationInterrupted
from engine.evaluation.comparison import EvaluationPlan
from engine.events import CheckpointSaved, LayerFinished
from engine.families.registry import FAMILIES as TABLES
from engine.inference.engine import open_engine
from engine.inference.request import GenerationRequest
from engine.models.blocks import ResidentModel
from engine.models.loading import load_full_precision
from engine.modules.swap import quant_linears
from engine.pipeline import QuantJob, quantize_model
from engine.recipe import Ingredients
from engine.rotation import Rotation
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec, Recipe
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_models import save_tiny_model

CALIBRATION = CalibrationSpec(samples=3, length=32, epochs=1, seed=4)
BOTH = Ingredients(rotation=True, online_hadamard=True)
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
FAMILIES = [name for name in TINY if name in TABLES and TABLES[name].rotates]


def quantize(
    source, folder, notation="w4a8", *, should_stop=lambda _: False, measure=False, **fields
):
    events = []
    values = {"ingredients": BOTH, "calibration": CALIBRATION, "recipe": Recipe.LWC, **fields}
    job = QuantJob(
        source_dir=source,
        out_dir=folder / "out",
        state_dir=folder / "state",
        spec=QuantSpec.from_notation(notation, **values),
        evaluation=EvaluationPlan(enabled=measure, windows=2, length=48),
    )
    report = quantize_model(
        job, Watch(on_event=events.append, should_stop=lambda: should_stop(events))
    )
    return report, [each for each in events if isinstance(each, LayerFinished)]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@torch.no_grad()
def logits_of(model):
    inputs = capture_inputs(model, TOKENS)
    hidden = inputs.hidden
    for index, call in enumerate(inputs.calls):
        hidden = call.run(model.load_block(index), hidden)
    return model.load_head()(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_model_of_every_family_is_quantized_measured_and_talks(tmp_path, family):
    source = save_tiny_model(tmp_path / "source", family)

    report, _ = quantize(source, tmp_path, "w4a8kv8", measure=True)

    measured = report.evaluation.perplexity
    assert measured.quant < 1.3 * measured.fp
    assert report.bits_per_weight == report.promised_bits_per_weight
    engine = open_engine(tmp_path / "out", "cpu")
    request = GenerationRequest(prompt_ids=(40, 41, 42), max_tokens=5, temperature=0)
    assert list(engine.generate(request))[-1].completion_tokens == 5
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_keep_the_logits_of_the_source(tmp_path, family):
    source = save_tiny_model(tmp_path / "source", family)
    quantize(source, tmp_path, "w8a16g32", recipe=Recipe.RTN)

    with torch.no_grad():
        actual = load_checkpoint(tmp_path / "out").model(TOKENS).logits

        wanted = load_full_precision(source)(TOKENS).logits
    error = (actual - wanted).square().mean() / wanted.square().mean()
    # a token at the edge of two experts may go to the other one
    assert error < (1e-2 if family == "mixtral" else 1e-3)


@pytest.mark.parametrize("notation", ["w4a16", "w4a8"])
def test_whole_and_block_by_block_a_reloaded_model_gives_the_same_logits(tmp_path, notation):
    quantize(save_tiny_model(tmp_path / "source"), tmp_path, notation)
    loaded = load_checkpoint(tmp_path / "out")

    with torch.no_grad():
        whole = loaded.model(TOKENS).logits

    blockwise = logits_of(ResidentModel(architecture=loaded.architecture, skeleton=loaded.model))
    # sums in another order may move an activation to the next of 256 codes
    tolerance = 1e-4 if notation == "w4a16" else 0.05
    torch.testing.assert_close(blockwise, whole, rtol=0, atol=tolerance)


def test_a_checkpoint_records_its_rotation_and_stores_no_more_than_without(tmp_path):
    source = save_tiny_model(tmp_path / "source", "qwen3", layers=1)

    turned, _ = quantize(source, tmp_path / "turned")
    plain, _ = quantize(source, tmp_path / "plain", ingredients=Ingredients())

    section = json.loads((tmp_path / "turned/out/config.json").read_text())["quantization_config"]
    assert section["rotation"] == {
        "residual_seed": 4,
        "residual_factors": [8, 8],
        "online_hadamard": True,
        "online_factors": {"mlp.down_proj": [8, 16]},
    }
    assert turned.bytes_quant == plain.bytes_quant
    assert turned.bits_per_weight == plain.bits_per_weight
    shard = "out/model-00001-of-00001.safetensors"
    names = load_file(tmp_path / "turned" / shard).keys()
    assert names == load_file(tmp_path / "plain" / shard).keys()
    assert "lm_head.weight" not in names
    loaded = [load_checkpoint(tmp_path / name / "out") for name in ("turned", "plain")]
    assert loaded[0].rotation == Rotation(seed=4, online_hadamard=True)
    assert 0 < loaded[0].memory_bytes - loaded[1].memory_bytes < 4096


def test_embedding_and_final_norm_are_stored_as_they_were_and_layer_norms_as_ones(tmp_path):
    source = save_tiny_model(tmp_path / "source", layers=1)
    quantize(source, tmp_path)

    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out/model-00001-of-00001.safetensors")

    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])
    norm = after["model.layers.0.input_layernorm.weight"]
    assert norm.eq(1).all()
    assert norm.dtype == torch.bfloat16
    # k_proj reads the stream, o_proj writes it
    biases = [f"model.layers.0.self_attn.{name}_proj.bias" for name in ("k", "o")]
    assert [torch.equal(after[name], before[name]) for name in biases] == [True, False]


def test_a_layer_left_in_full_precision_is_stored_rotated(tmp_path):
    source = save_tiny_model(tmp_path / "source")
    kept = (LayerOverride(pattern="*.mlp.*", w_bits=16),)
    quantize(source, tmp_path, "w8a16g32", recipe=Recipe.RTN, overrides=kept)

    loaded = load_checkpoint(tmp_path / "out")

    assert not any("mlp" in name for name in quant_linears(loaded.model))
    with torch.no_grad():
        actual, wanted = loaded.model(TOKENS).logits, load_full_precision(source)(TOKENS).logits
    assert (actual - wanted).square().mean() / wanted.square().mean() < 1e-3


def test_equal_rotated_jobs_write_equal_bytes_also_when_interrupted(tmp_path):
    source = save_tiny_model(tmp_path / "source", layers=3)
    quantize(source, tmp_path / "a")

    def after_two(events):
        return sum(isinstance(each, CheckpointSaved) for each in events) >= 2

    with pytest.raises(CalibrationInterrupted):
        quantize(source, tmp_path / "b", should_stop=after_two)
    _, finished = quantize(source, tmp_path / "b")

    assert [each.resumed for each in finished] == [True, True, False]
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_the_seed_of_the_calibration_chooses_the_rotation(tmp_path):
    source = save_tiny_model(tmp_path / "source", layers=1)
    other = CalibrationSpec(samples=3, length=32, epochs=1, seed=5)

    quantize(source, tmp_path, calibration=other)

    assert load_checkpoint(tmp_path / "out").rotation.seed == 5


def with_outliers(folder):
    """Give the residual stream and the MLPs a few loud channels, as large models have them."""
    save_tiny_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 7] += 3
    for index in range(2):
        weights[f"model.layers.{index}.mlp.up_proj.weight"][11] *= 30
        weights[f"model.layers.{index}.mlp.down_proj.weight"][:, 11] /= 30
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_rotations_lower_the_error_of_four_bit_activations(tmp_path):
    source = with_outliers(tmp_path / "source")
    losses = {}

    for name, ingredients in {
        "plain": Ingredients(),
        "residual": Ingredients(rotation=True),
        "both": BOTH,
    }.items():
        fields = {"recipe": Recipe.RTN, "ingredients": ingredients}
        _, finished = quantize(source, tmp_path / name, "w8a4", **fields)
        losses[name] = finished[-1].loss_after

    assert losses["both"] < losses["residual"] < losses["plain"]
    assert losses["both"] < 0.7 * losses["plain"]


def test_the_full_precision_perplexity_is_that_of_the_source_as_it_is(tmp_path):
    source = save_tiny_model(tmp_path / "source", layers=1)

    turned, _ = quantize(source, tmp_path / "turned", measure=True)
    plain, _ = quantize(source, tmp_path / "plain", measure=True, ingredients=Ingredients())

    assert turned.evaluation.perplexity.fp == plain.evaluation.perplexity.fp


def test_layer_errors_of_a_rotated_result_are_taken_in_the_basis_of_the_source(tmp_path):
    source = save_tiny_model(tmp_path / "source")

    report, _ = quantize(source, tmp_path, "w8a16g32", recipe=Recipe.RTN, measure=True)

    # in two different bases the difference would be as large as the states themselves
    errors = report.evaluation.layer_errors
    assert len(errors) == 2
    assert max(errors) < 1e-2
