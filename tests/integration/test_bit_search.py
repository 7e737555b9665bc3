"""A bit target from request to checkpoint, on a tiny model with one layer that is hard to round."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.calibration.watch import Watch
from engine.checkpoint.format import spec_of_section
from engine.checkpoint.manifest import read_manifest, verify_directory
from engine.checkpoint.reader import load_checkpoint
from engine.effort import MAX_FLOPS
from engine.errors import CalibrationInterrupted, SpecError
from engine.evaluation.comparison import EvaluationPlan
from engine.events import BitsChosen, CheckpointSaved, LayerStarted, LogLine, Stage, StageStarted
from engine.models.loading import load_full_precision
from engine.modules.swap import quant_linears
from engine.pipeline import QuantJob, quantize_model
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec
from engine.target import BitTarget
from tests.tiny_models import save_tiny_model

CALIBRATION = CalibrationSpec(samples=2, length=32, epochs=1)
LAYERS = 2
HARD = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of which one linear has outliers: a grid over its range rounds the rest coarsely."""
    folder = save_tiny_model(tmp_path_factory.mktemp("source"), layers=LAYERS)
    weights = load_file(folder / "model.safetensors")
    weights[f"{HARD}.weight"][:, ::32] *= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def found(source, tmp_path_factory):
    """Where the bits of 3.5 on average were searched, with report and events."""
    folder = tmp_path_factory.mktemp("found")
    return folder, *quantize(job_of(source, folder, average_bits=3.5))


@pytest.fixture(scope="module")
def allowed(source, tmp_path_factory):
    """Folder and report by the increase of perplexity that was allowed."""
    folders = {increase: tmp_path_factory.mktemp("allowed") for increase in (0.2, 0.02)}
    return {
        increase: (folder, quantize(job_of(source, folder, perplexity_increase=increase))[0])
        for increase, folder in folders.items()
    }


def job_of(source, folder, *overrides, **goal):
    spec = QuantSpec(
        w_bits=4,
        a_bits=8,
        overrides=overrides,
        target=BitTarget(**goal),
        calibration=CALIBRATION,
    )
    return QuantJob(
        source_dir=source,
        out_dir=folder / "out",
        state_dir=folder / "state",
        spec=spec,
        evaluation=EvaluationPlan(enabled=False),
    )


def quantize(job, should_stop=lambda: False):
    events = []
    report = quantize_model(job, Watch(on_event=events.append, should_stop=should_stop))
    return report, events


def of_type(events, kind):
    return [each for each in events if isinstance(each, kind)]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def weight_bits(record):
    return {each.name: each.w_bits for each in record.layers}


@pytest.mark.parametrize("average", [2.9, 5.0])
def test_average_bits_are_met_and_never_passed(source, tmp_path, average):
    report, events = quantize(job_of(source, tmp_path, average_bits=average))

    record = verify_directory(tmp_path / "out").search
    assert average - 0.1 < report.bits_per_weight <= average
    assert record.predicted_average_bits == record.achieved_average_bits == report.bits_per_weight
    assert [each.stage for each in of_type(events, StageStarted)][:2] == [
        Stage.SEARCHING,
        Stage.CALIBRATING,
    ]
    assert len(set(weight_bits(record).values())) > 1


def test_a_size_in_bytes_is_met_and_never_passed(source, tmp_path):
    report, _ = quantize(job_of(source, tmp_path, max_bytes=110_000))

    assert 108_000 < report.bytes_quant <= 110_000
    record = read_manifest(tmp_path / "out").search
    assert record.predicted_bytes == report.bytes_quant


@pytest.mark.parametrize("increase", [0.2, 0.02])
def test_an_allowed_increase_of_perplexity_bounds_the_predicted_loss(allowed, increase):
    folder, report = allowed[increase]

    record = read_manifest(folder / "out").search
    assert 0.5 * math.log1p(increase) < record.predicted_loss <= math.log1p(increase)
    # none of the layers could be narrower by one step within what is left
    left = math.log1p(increase) - record.predicted_loss
    for each in record.layers:
        narrower = [loss for bits, loss in each.w_losses.items() if int(bits) < each.w_bits]
        assert all(loss - each.w_losses[str(each.w_bits)] > left for loss in narrower)
    assert report.bits_per_weight == record.predicted_average_bits


def test_a_stricter_allowance_takes_more_bits(allowed):
    loose, strict = allowed[0.2][1], allowed[0.02][1]

    assert strict.bits_per_weight > loose.bits_per_weight


def test_the_layer_that_is_hard_to_round_gets_more_bits_and_the_record_says_why(source, tmp_path):
    quantize(job_of(source, tmp_path, average_bits=4.5))

    record = read_manifest(tmp_path / "out").search
    by_name = {each.name: each for each in record.layers}
    hard, other = by_name[HARD], by_name["model.layers.0.mlp.down_proj"]
    assert hard.w_bits > other.w_bits
    assert hard.w_losses[str(other.w_bits)] > 4 * other.w_losses[str(other.w_bits)]
    # at the same width as the other, its next step would have been the better buy
    assert hard.price_of_last > other.price_of_next
    assert record.price == min(
        each.price_of_last for each in record.layers if each.price_of_last is not None
    )
    assert set(hard.w_losses) == {"2", "3", "4", "5", "6", "8"}


def test_searched_bits_lose_less_than_the_same_bits_everywhere(source, tmp_path):
    text = CalibrationSpec(samples=8, length=64, epochs=1)
    even = QuantSpec(w_bits=4, a_bits=8, calibration=text)
    target = BitTarget(average_bits=13 / 3)
    uniform = replace(job_of(source, tmp_path / "uniform", average_bits=4), spec=even)
    job = replace(
        uniform,
        spec=replace(even, target=target),
        out_dir=tmp_path / "out",
        state_dir=tmp_path / "state",
    )

    searched_report, _ = quantize(job)
    uniform_report, _ = quantize(uniform)

    assert searched_report.bits_per_weight <= uniform_report.bits_per_weight
    assert loss_of(source, job.out_dir) < 0.8 * loss_of(source, uniform.out_dir)


@torch.no_grad()
def loss_of(source, checkpoint):
    """KL of the logits to the source's, on tokens that nothing was calibrated with."""
    tokens = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(1))
    log_p, log_q = (
        torch.log_softmax(model(tokens).logits.double(), -1)
        for model in (load_full_precision(source), load_checkpoint(checkpoint).model)
    )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_config_manifest_report_and_events_tell_the_same_bits(source, tmp_path):
    job = job_of(source, tmp_path, average_bits=3.5, w_choices=(2, 3, 4, 8))
    report, events = quantize(job)

    manifest = read_manifest(tmp_path / "out")
    chosen = manifest.search.chosen
    assert manifest.spec.target == job.spec.target == manifest.search.target
    assert QuantSpec.from_json(json.loads(json.dumps(manifest.spec.to_json()))) == manifest.spec
    assert {each.name: (each.w_bits, each.a_bits) for each in manifest.layers} == chosen
    [told] = of_type(events, BitsChosen)
    assert told.bits == report.to_json()["search"]["bits"] == chosen
    started = {
        f"{each.name}.{name}": bits
        for each in of_type(events, LayerStarted)
        for name, bits in each.bits.items()
    }
    assert started == weight_bits(manifest.search)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert spec_of_section(config).overrides == manifest.spec.overrides
    loaded = quant_linears(load_checkpoint(tmp_path / "out").model)
    assert {name: each.grid.bits for name, each in loaded.items()} == started


def test_inputs_get_bits_of_their_own_where_there_is_a_choice(source, tmp_path):
    goal = {"average_bits": 3.5, "a_choices": (4, 6, 8)}
    quantize(job_of(source, tmp_path, **goal))

    record = read_manifest(tmp_path / "out").search
    assert len({each.a_bits for each in record.layers}) > 1
    assert record.predicted_activation_loss <= record.predicted_weight_loss / 4
    loaded = quant_linears(load_checkpoint(tmp_path / "out").model)
    assert {name: each.a_bits for name, each in loaded.items()} == {
        each.name: each.a_bits for each in record.layers
    }


def test_rounded_inputs_are_part_of_what_perplexity_may_lose(source, tmp_path):
    goal = {"perplexity_increase": 0.05, "a_choices": (4, 6, 8)}
    quantize(job_of(source, tmp_path, **goal))

    record = read_manifest(tmp_path / "out").search
    assert record.predicted_loss <= math.log1p(0.05)
    assert record.predicted_activation_loss > 0


def test_layers_that_the_request_pins_keep_their_bits(source, tmp_path):
    pinned = (
        LayerOverride(pattern="*.q_proj", w_bits=8, a_bits=16),
        LayerOverride(pattern="model.layers.0.mlp.*", w_bits=16),
    )
    report, _ = quantize(job_of(source, tmp_path, *pinned, average_bits=4))

    record = read_manifest(tmp_path / "out").search
    assert report.bits_per_weight <= 4
    assert {
        (each.w_bits, each.a_bits, each.is_pinned)
        for each in record.layers
        if "q_proj" in each.name
    } == {(8, 16, True)}
    assert not [each for each in record.layers if each.name.startswith("model.layers.0.mlp")]


def test_an_interrupted_search_and_calibration_end_with_the_same_bytes(source, found, tmp_path):
    job = job_of(source, tmp_path, average_bits=3.5)
    events = []

    for stop in (
        (job.state_dir / "search.json").exists,
        lambda: len(of_type(events, CheckpointSaved)) >= 1,
    ):
        with pytest.raises(CalibrationInterrupted):
            quantize_model(job, Watch(on_event=events.append, should_stop=stop))
        assert not job.out_dir.exists()
    measured = (job.state_dir / "search.json").stat().st_mtime_ns
    quantize(job)

    assert (job.state_dir / "search.json").stat().st_mtime_ns == measured
    assert bytes_of(tmp_path) == bytes_of(found[0])


def test_another_amount_with_the_same_widths_is_solved_from_the_same_measurements(
    source, found, tmp_path
):
    shutil.copytree(found[0], tmp_path, dirs_exist_ok=True)
    measured = (tmp_path / "state" / "search.json").stat().st_mtime_ns
    first = read_manifest(tmp_path / "out").search

    quantize(job_of(source, tmp_path, average_bits=5))

    second = read_manifest(tmp_path / "out").search
    assert (tmp_path / "state" / "search.json").stat().st_mtime_ns == measured
    assert [each.w_losses for each in first.layers] == [each.w_losses for each in second.layers]
    assert weight_bits(first) != weight_bits(second)


def test_beyond_its_allowance_a_search_follows_one_width_and_scales_the_others(
    source, tmp_path, monkeypatch
):
    monkeypatch.setitem(MAX_FLOPS, "cpu", 1.0)

    report, _ = quantize(job_of(source, tmp_path, average_bits=4.5))

    record = read_manifest(tmp_path / "out").search
    assert record.anchors == 1
    assert report.bits_per_weight <= 4.5
    bits = weight_bits(record)
    assert bits[HARD] > bits["model.layers.0.mlp.down_proj"]
    for each in record.layers:
        losses = [each.w_losses[width] for width in ("2", "3", "4", "5", "6", "8")]
        assert losses == sorted(losses, reverse=True)
        assert 0 < each.a_losses["8"] < each.w_losses["4"]


def test_a_spec_that_was_found_finds_itself(source, found, tmp_path):
    first = read_manifest(found[0] / "out")

    quantize(replace(job_of(source, tmp_path, average_bits=3.5), spec=first.spec))

    again = read_manifest(tmp_path / "out").search
    assert weight_bits(again) == weight_bits(first.search)
    assert all(each.is_pinned for each in again.layers)


def test_the_cost_of_a_search_is_told_before_it_starts(found):
    _, _, events = found

    told = next(each.message for each in of_type(events, LogLine) if "searching" in each.message)
    assert "14 layers with 2 windows of 32 tokens" in told
    assert "operations" in told


@pytest.mark.parametrize(
    ("goal", "field", "remedy"),
    [
        ({"average_bits": 2.0}, "target.average_bits", "stored bits per weight"),
        ({"max_bytes": 20_000}, "target.max_bytes", "bytes here"),
        ({"perplexity_increase": 1e-4, "w_choices": (2,)}, "target.perplexity_increase", "wider"),
    ],
)
def test_a_target_out_of_reach_is_refused_with_what_would_do(source, tmp_path, goal, field, remedy):
    with pytest.raises(SpecError) as refused:
        quantize(job_of(source, tmp_path, **goal))

    assert refused.value.field == field
    assert remedy in refused.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_source_in_fp32_counts_with_its_own_bytes(source, tmp_path):
    wide = save_tiny_model(tmp_path / "source", layers=LAYERS)
    weights = load_file(wide / "model.safetensors")
    save_file(
        {name: each.to(torch.float32) for name, each in weights.items()},
        wide / "model.safetensors",
        metadata={"format": "pt"},
    )

    report, _ = quantize(job_of(wide, tmp_path, max_bytes=180_000))

    assert 175_000 < report.bytes_quant <= 180_000


def test_without_a_target_nothing_is_searched(source, tmp_path):
    job = job_of(source, tmp_path, average_bits=4)

    report, events = quantize(replace(job, spec=replace(job.spec, target=None)))

    assert not of_type(events, BitsChosen)
    assert report.to_json()["search"] is None
    assert "search" not in json.loads((tmp_path / "out" / "abq_manifest.json").read_text())
