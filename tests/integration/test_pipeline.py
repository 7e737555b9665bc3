"""The engine from source directory to checkpoint directory, on tiny models of every family."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.calibration.placement import ChainMemory
from engine.calibration.watch import Watch
from engine.checkpoint.manifest import read_manifest, verify_directory
from engine.checkpoint.reader import load_checkpoint
from engine.errors import (
    CalibrationDiverged,
    CalibrationInterrupted,
    DatasetUnavailable,
    SpecError,
    UnsupportedModel,
)
from engine.evaluation.perplexity import measure_perplexity
from engine.evaluation.plan import EvaluationPlan, EvaluationText
from engine.events import (
    ArtifactFile,
    CheckpointSaved,
    EvaluationFailed,
    EvaluationResult,
    LayerFinished,
    LayerStarted,
    LogLine,
    Stage,
    StageStarted,
)
from engine.inference.kv_cache import make_cache
from engine.models.blocks import ResidentModel
from engine.pipeline import QuantJob, quantize_model
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec, Recipe
from tests.chained import chained_logits, draw_tokens
from tests.tiny_models import FAMILIES, TINY, save_tiny_model

CALIBRATION = CalibrationSpec(samples=3, length=32, epochs=2)
SMALL_PLAN = EvaluationPlan(windows=2, length=48)
COARSE = QuantSpec(w_bits=3, a_bits=6, kv_bits=4, calibration=CALIBRATION)
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("source"), layers=LAYERS)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """A job that nobody interrupts: its folder, report and events."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *quantize(job_of(source, folder, evaluation=SMALL_PLAN))


@pytest.fixture(scope="module")
def coarse(source, tmp_path_factory):
    """The same with fewer bits of everything and without an evaluation."""
    folder = tmp_path_factory.mktemp("coarse")
    quantize(job_of(source, folder, spec=COARSE))
    return folder


def job_of(source, folder, **fields):
    values = {
        "spec": QuantSpec(w_bits=4, a_bits=8, calibration=CALIBRATION),
        "evaluation": EvaluationPlan(enabled=False),
        **fields,
    }
    return QuantJob(source_dir=source, out_dir=folder / "out", state_dir=folder / "state", **values)


def quantize(job, should_stop=lambda: False):
    events = []
    report = quantize_model(job, Watch(on_event=events.append, should_stop=should_stop))
    return report, events


def of_type(events, kind):
    return [each for each in events if isinstance(each, kind)]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def stop_after(blocks, events):
    """Make a `should_stop` that says yes once so many blocks are saved."""
    return lambda: len(of_type(events, CheckpointSaved)) >= blocks


def interrupt(job, blocks):
    events = []
    watch = Watch(on_event=events.append, should_stop=stop_after(blocks, events))
    with pytest.raises(CalibrationInterrupted):
        quantize_model(job, watch)
    return events


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_of_every_family_is_quantized_and_measured(tmp_path, model_type):
    source = save_tiny_model(tmp_path / "source", model_type)
    spec = QuantSpec(w_bits=3, a_bits=8, kv_bits=8, group_size=32, calibration=CALIBRATION)

    report, events = quantize(job_of(source, tmp_path, spec=spec, evaluation=SMALL_PLAN))

    assert report.bits_per_weight == report.promised_bits_per_weight == 3 + 24 / 32
    assert report.evaluation.perplexity.quant < 1.5 * report.evaluation.perplexity.fp
    assert [each.stage for each in of_type(events, StageStarted)] == [
        Stage.CALIBRATING,
        Stage.TUNING,
        Stage.PACKING,
        Stage.EVALUATING,
    ]
    assert all(each.loss_after <= each.loss_before for each in of_type(events, LayerFinished))
    manifest = verify_directory(tmp_path / "out")
    assert manifest.evaluation == report.evaluation
    assert len(manifest.layers) == 2 * TINY[model_type].linears
    assert not any(each.fell_back for each in manifest.layers)
    loaded, tokens = load_checkpoint(tmp_path / "out"), draw_tokens()
    with torch.no_grad():
        assert torch.equal(chained_logits(loaded, tokens), loaded.model(tokens).logits)


def test_events_tell_every_layer_and_every_file(undisturbed):
    folder, report, events = undisturbed

    started, finished = of_type(events, LayerStarted), of_type(events, LayerFinished)
    assert [each.name for each in started] == [f"model.layers.{i}" for i in range(LAYERS)]
    assert [(each.index, each.total) for each in finished] == [(i, LAYERS) for i in range(LAYERS)]
    assert set(started[0].bits.values()) == {4}
    assert all(each.memory_bytes > 10**6 for each in finished)
    assert [each.index for each in of_type(events, CheckpointSaved)] == list(range(LAYERS))
    files = {each.path: (each.bytes, each.sha256) for each in of_type(events, ArtifactFile)}
    assert files["abq_manifest.json"][1] == report.manifest_sha256
    assert files.keys() == bytes_of(folder).keys()
    [measured] = of_type(events, EvaluationResult)
    assert (measured.fp, measured.quant) == (
        report.evaluation.perplexity.fp,
        report.evaluation.perplexity.quant,
    )


def test_equal_jobs_write_equal_bytes(source, undisturbed, tmp_path):
    quantize(job_of(source, tmp_path, evaluation=SMALL_PLAN))

    assert bytes_of(tmp_path) == bytes_of(undisturbed[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_writes_equal_bytes_and_resumes_to_them(source, tmp_path):
    quantize(job_of(source, tmp_path / "a", device="cuda", evaluation=SMALL_PLAN))
    job = job_of(source, tmp_path / "b", device="cuda", evaluation=SMALL_PLAN)

    interrupt(job, 1)
    quantize(job)

    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_hidden_states_on_disk_end_with_the_same_bytes_and_no_file(source, tmp_path):
    # tuned end to end, so the last stage reads them as well
    spec = QuantSpec(w_bits=3, group_size=32, recipe=Recipe.DEFAULT, calibration=CALIBRATION)
    quantize(job_of(source, tmp_path / "a", spec=spec))

    on_disk = ChainMemory(host_bytes=0)
    _, events = quantize(job_of(source, tmp_path / "b", spec=spec, chain_memory=on_disk))

    said = [each.message for each in of_type(events, LogLine)]
    assert any("kept on disk" in each for each in said)
    assert any("tuned end to end" in each for each in said)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    state = {path.name.split("-")[0] for path in (tmp_path / "b" / "state").iterdir()}
    assert state == {"block", "fingerprint.json"}


def test_another_seed_writes_other_bytes(source, undisturbed, tmp_path):
    seeded = CalibrationSpec(samples=3, length=32, epochs=2, seed=1)

    spec = QuantSpec(w_bits=4, a_bits=8, calibration=seeded)
    quantize(job_of(source, tmp_path, spec=spec, evaluation=SMALL_PLAN))

    assert packed_codes(tmp_path) != packed_codes(undisturbed[0])


def packed_codes(folder):
    tensors = load_file(folder / "out" / "model-00001-of-00001.safetensors")
    return {name: each.tolist() for name, each in tensors.items() if name.endswith("_packed")}


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_interrupted_run_resumes_at_its_block_and_ends_with_the_same_bytes(
    source, coarse, tmp_path, blocks
):
    job = job_of(source, tmp_path, spec=COARSE)

    interrupt(job, blocks)
    assert not job.out_dir.exists()
    _, events = quantize(job)

    finished = of_type(events, LayerFinished)
    assert [each.resumed for each in finished] == [i < blocks for i in range(LAYERS)]
    assert [each.index for each in of_type(events, CheckpointSaved)] == [*range(blocks, LAYERS)]
    assert bytes_of(tmp_path) == bytes_of(coarse)


@pytest.mark.parametrize("model_type", ["falcon-40b", "gemma2", "mixtral", "opt-350m"])
def test_other_families_resume_to_the_same_bytes(tmp_path, model_type):
    source = save_tiny_model(tmp_path / "source", model_type)
    quantize(job_of(source, tmp_path / "undisturbed"))
    job = job_of(source, tmp_path / "disturbed")

    interrupt(job, 1)
    quantize(job)

    assert bytes_of(tmp_path / "disturbed") == bytes_of(tmp_path / "undisturbed")


def test_a_checkpoint_of_another_calibration_is_not_taken_up(source, tmp_path):
    interrupt(job_of(source, tmp_path), 2)
    other = QuantSpec(w_bits=3, a_bits=8, calibration=CALIBRATION)

    _, events = quantize(job_of(source, tmp_path, spec=other))

    assert not any(each.resumed for each in of_type(events, LayerFinished))
    assert any("starting afresh" in each.message for each in of_type(events, LogLine))


def test_a_damaged_block_is_calibrated_again(source, coarse, tmp_path):
    job = job_of(source, tmp_path, spec=COARSE)
    interrupt(job, 2)
    (job.state_dir / "block-00001.safetensors").write_bytes(b"torn")

    _, events = quantize(job)

    assert [each.resumed for each in of_type(events, LayerFinished)] == [True, False, False]
    assert bytes_of(tmp_path) == bytes_of(coarse)


def changed_source(folder, name, value):
    """A model with every weight of one tensor, or a single one, replaced."""
    broken = save_tiny_model(folder, layers=LAYERS)
    weights = load_file(broken / "model.safetensors")
    weights[name].view(-1)[: None if math.isfinite(value) else 1] = value
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return broken


def test_a_diverging_layer_is_named_and_finished_blocks_are_kept(tmp_path):
    # the largest finite weights: rotated they are not
    broken = changed_source(tmp_path / "source", "model.layers.2.mlp.down_proj.weight", 3e38)
    job = job_of(broken, tmp_path)

    with pytest.raises(CalibrationDiverged) as diverged:
        quantize(job)

    assert diverged.value.layer == "model.layers.2.mlp.down_proj"
    assert not job.out_dir.exists()
    assert sorted(path.name for path in job.state_dir.glob("block-*.json")) == [
        "block-00000.json",
        "block-00001.json",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.2.mlp.down_proj.weight", torch.nan),
        ("lm_head.weight", torch.nan),
        ("model.norm.weight", torch.inf),
        ("model.embed_tokens.weight", -torch.inf),
    ],
)
def test_a_weight_that_is_not_finite_is_named_before_any_work(tmp_path, name, value):
    job = job_of(changed_source(tmp_path / "source", name, value), tmp_path)

    with pytest.raises(CalibrationDiverged, match="its weight is not finite") as diverged:
        quantize(job)

    assert diverged.value.layer == name.removesuffix(".weight")
    assert not job.state_dir.exists()


def test_logits_that_are_not_finite_are_not_tuned_and_leave_no_result(tmp_path):
    broken = changed_source(tmp_path / "source", "lm_head.weight", 3e38)
    job = job_of(broken, tmp_path)

    with pytest.raises(CalibrationDiverged, match="divergence of the logits"):
        quantize(job)

    assert not list(job.state_dir.glob("block-99999*"))
    assert not job.out_dir.exists()


def test_a_failing_evaluation_leaves_the_artifact(source, tmp_path):
    missing = EvaluationPlan(
        windows=2, length=48, texts=(EvaluationText(path=tmp_path / "none.txt"),)
    )

    report, events = quantize(job_of(source, tmp_path, evaluation=missing))

    [failed] = of_type(events, EvaluationFailed)
    assert "none.txt" in failed.message
    assert report.to_json()["evaluation_status"] == "failed"
    assert report.to_json()["perplexity"] is None
    manifest = verify_directory(tmp_path / "out")
    assert manifest.evaluation.status == "failed"


def test_an_interrupted_evaluation_is_no_failure(source, tmp_path):
    job = job_of(source, tmp_path, evaluation=SMALL_PLAN)
    events = []
    reached = lambda: any(each.stage == Stage.EVALUATING for each in of_type(events, StageStarted))  # noqa: E731

    with pytest.raises(CalibrationInterrupted):
        quantize_model(job, Watch(on_event=events.append, should_stop=reached))

    assert not of_type(events, EvaluationFailed)


def test_the_manifest_says_where_it_came_from_and_nothing_of_when(source, tmp_path):
    quantize(job_of(source, tmp_path, repo="acme/tiny", revision="f" * 40))

    manifest = read_manifest(tmp_path / "out")
    assert manifest.source == {"repo": "acme/tiny", "revision": "f" * 40}
    text = (tmp_path / "out" / "abq_manifest.json").read_text()
    assert not {"seconds", "created_at", "host"} & set(json.loads(text))
    assert str(tmp_path) not in text


def test_overridden_layers_keep_their_bits_or_their_precision(source, tmp_path):
    overrides = (
        LayerOverride(pattern="*.mlp.down_proj", w_bits=8, group_size=64),
        LayerOverride(pattern="model.layers.0.*", w_bits=16),
    )
    # a rotation would be stored in what stays in full precision too
    spec = QuantSpec(
        w_bits=2,
        bit_balance=True,
        overrides=overrides,
        recipe=Recipe.LWC,
        calibration=CALIBRATION,
    )

    report, events = quantize(job_of(source, tmp_path, spec=spec))

    loaded = load_checkpoint(tmp_path / "out").model
    kept = loaded.get_submodule("model.layers.0.mlp.up_proj").weight
    original = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(kept, original.float())
    assert of_type(events, LayerStarted)[1].bits["mlp.down_proj"] == 8
    assert of_type(events, LayerStarted)[0].bits["mlp.up_proj"] == 16
    assert report.bits_per_weight == report.promised_bits_per_weight


def test_evaluation_sees_the_keys_and_values_that_generation_keeps(source, tmp_path):
    spec = QuantSpec(w_bits=8, a_bits=8, kv_bits=3, calibration=CALIBRATION)
    quantize(job_of(source, tmp_path, spec=spec))
    loaded = load_checkpoint(tmp_path / "out")
    tokens = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))

    measured = measure_perplexity(
        ResidentModel(architecture=loaded.architecture, skeleton=loaded.model),
        tokens,
        Watch(on_event=lambda _: None),
        kv_bits=3,
    )

    with torch.no_grad():
        logits = loaded.model(tokens, past_key_values=make_cache(LAYERS, 3)).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert measured.value == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"spec": QuantSpec(w_bits=4, group_size=96)}, SpecError),
        ({"spec": QuantSpec(w_bits=4, calibration=CalibrationSpec(length=1024))}, SpecError),
        ({"evaluation": EvaluationPlan(length=1024)}, SpecError),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_before_any_work(source, tmp_path, fields, error):
    job = job_of(source, tmp_path, **fields)

    with pytest.raises(error):
        quantize(job)

    assert not job.state_dir.exists()


def test_the_source_is_never_replaced_by_its_result(source, tmp_path):
    before = sorted(path.name for path in source.iterdir())
    job = replace(job_of(source, tmp_path), out_dir=source)

    with pytest.raises(SpecError, match="out_dir"):
        quantize(job)

    assert sorted(path.name for path in source.iterdir()) == before
    assert not job.state_dir.exists()


def test_a_text_that_is_too_short_is_refused(source, tmp_path):
    (tmp_path / "short.txt").write_text("too short")

    with pytest.raises(DatasetUnavailable, match="9 tokens"):
        quantize(job_of(source, tmp_path, calibration_text=tmp_path / "short.txt"))


def test_tokens_that_the_model_lacks_are_refused_and_cost_an_evaluation_alone(tmp_path):
    # the tokenizer ends its words at 259
    source = save_tiny_model(tmp_path / "source", vocab_size=257)
    text = tmp_path / "turns.txt"
    text.write_text("Good day.<|user|>" * 40)

    with pytest.raises(DatasetUnavailable, match=r"turns\.txt has the token 258 .* ends at 256"):
        quantize(job_of(source, tmp_path, calibration_text=text))

    plan = replace(SMALL_PLAN, texts=(EvaluationText(path=text),))
    spec = QuantSpec(w_bits=4, recipe=Recipe.RTN, calibration=CALIBRATION)
    report, _ = quantize(job_of(source, tmp_path, spec=spec, evaluation=plan))
    assert "ends at 256" in report.evaluation.texts[0].message


def test_a_config_with_foreign_code_is_refused(tmp_path):
    source = save_tiny_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))

    with pytest.raises(UnsupportedModel, match="auto_map"):
        quantize(job_of(source, tmp_path))
