"""The accuracy benchmark on a tiny model: our methods, a peer's weights, and rows that fail."""

import importlib.util
import json

import pytest
import torch

from benchmarks import ablation, accuracy
from benchmarks.case import Case, Method
from benchmarks.peers.base import check_levels, grid_of, stored_bits
from benchmarks.peers.overlaid import OverlaidModel
from engine.calibration.watch import Watch
from engine.checkpoint.reader import load_checkpoint
from engine.evaluation.perplexity import measure_perplexity
from engine.models.blocks import ResidentModel
from engine.models.loading import SourceModel, load_full_precision
from engine.numerics.affine import fake_quantize, weight_range
from engine.spec import QuantSpec
from tests.tiny_models import save_tiny_model
from tests.unit.engine.quantized_models import save_checkpoint

TEXT = "It was the best of times, it was the worst of times. " * 40
SILENT = Watch(on_event=lambda _: None)
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    save_tiny_model(folder / "tiny")
    (folder / "eval.txt").write_text(TEXT)
    return folder


def run(folder, out, *options):
    accuracy.main([
        "--model", str(folder / "tiny"), "--eval-text", str(folder / "eval.txt"),
        "--samples", "3", "--length", "32", "--epochs", "1", "--eval-windows", "2",
        "--eval-length", "64", "--device", "cpu", "--jobs", "2", "--out", str(out), *options,
    ])  # fmt: skip
    return json.loads((out / "accuracy.json").read_text())


def test_a_run_writes_a_row_for_every_configuration_and_method(folder, tmp_path, capsys):
    record = run(folder, tmp_path, "--configs", "w4a16,w2a16g32", "--methods", "rtn,lwc")

    rows = record["rows"]
    assert [(row["config"], row["method"]) for row in rows] == [
        ("w4a16", "rtn"), ("w4a16", "lwc"), ("w2a16g32", "rtn"), ("w2a16g32", "lwc"),
    ]  # fmt: skip
    assert [row["bits_per_weight"] for row in rows] == [4.3333, 4.3333, 2.75, 2.75]
    assert len({row["ppl_fp_wikitext2"] for row in rows}) == 1
    assert all(row["ppl_wikitext2"] != row["ppl_second"] for row in rows)
    assert all(row["kl_wikitext2"] > 0 for row in rows)
    assert record["settings"]["eval_text"] == "eval.txt"
    assert {"hardware", "versions", "commit"} <= record.keys()
    assert "w2a16g32" in capsys.readouterr().out


def run_ablation(folder, out, *options):
    ablation.main([
        "--model", str(folder / "tiny"), "--eval-text", str(folder / "eval.txt"),
        "--samples", "3", "--length", "32", "--epochs", "1", "--eval-windows", "2",
        "--eval-length", "64", "--device", "cpu", "--jobs", "2", "--out", str(out), *options,
    ])  # fmt: skip
    return json.loads((out / "ablation.json").read_text())["rows"]


def test_an_ablation_changes_one_ingredient_of_the_recipe_at_a_time(folder, tmp_path, capsys):
    rows = run_ablation(
        folder, tmp_path, "--configs", "w2a16g32", "--variants", "as-it-is,no-second-order"
    )

    assert [row["variant"] for row in rows] == ["as-it-is", "no-second-order"]
    assert rows[0]["kl_wikitext2"] != rows[1]["kl_wikitext2"]
    assert "no-second-order" in capsys.readouterr().out


def test_an_ablation_adds_single_rows_to_those_it_has_and_tells_their_commit(
    folder, tmp_path, monkeypatch
):
    short = ("--timeout", "0.2")
    monkeypatch.setenv("ABQ_COMMIT", "first")
    run_ablation(folder, tmp_path, "--rows", "w4a16:nearest,w4a4:gptq", *short)

    monkeypatch.setenv("ABQ_COMMIT", "second")
    rows = run_ablation(folder, tmp_path, "--rows", "w4a4:as-it-is", "--append", *short)

    assert [(row["config"], row["variant"]) for row in rows] == [
        ("w4a16", "nearest"), ("w4a4", "as-it-is"), ("w4a4", "gptq"),
    ]  # fmt: skip
    assert [row.get("commit") for row in rows] == ["first", None, "first"]


@pytest.mark.skipif(
    importlib.util.find_spec("auto_round") is not None, reason="the peer is installed here"
)
def test_a_peer_that_is_not_installed_costs_its_own_row_alone(folder, tmp_path):
    rows = run(folder, tmp_path, "--configs", "w4a16", "--methods", "autoround,rtn")["rows"]

    [ours, peer] = rows
    assert ours["ppl_wikitext2"] > 0
    assert "extra `bench`" in peer["error"]


def test_a_row_that_takes_too_long_is_ended_and_says_so(folder, tmp_path):
    [row] = run(
        folder, tmp_path, "--configs", "w4a16", "--methods", "rtn", "--timeout", "0.2"
    )["rows"]  # fmt: skip

    assert row == {"config": "w4a16", "method": "rtn", "error": "not done after 0.2 s"}


def test_rows_of_an_earlier_run_are_kept_when_asked_for(folder, tmp_path):
    run(folder, tmp_path, "--configs", "w4a16", "--methods", "rtn", "--timeout", "0.2")

    rows = run(
        folder, tmp_path, "--configs", "w8a16", "--methods", "rtn", "--timeout", "0.2", "--append"
    )["rows"]

    assert {row["config"] for row in rows} == {"w4a16", "w8a16"}


def test_rows_of_other_settings_are_not_mixed_in(folder, tmp_path):
    run(folder, tmp_path, "--configs", "w4a16", "--methods", "rtn", "--timeout", "0.2")

    with pytest.raises(SystemExit, match="was measured with"):
        run(folder, tmp_path, "--configs", "w4a16", "--methods", "rtn", "--seed", "1", "--append")


def test_a_case_is_read_as_it_was_written(tmp_path):
    case = Case(
        model=tmp_path, config="w2a16g64", method=Method.GPTQ, text=None,
        eval_text=tmp_path / "a", second_text=None, samples=4, length=32, epochs=1, seed=3,
        eval_windows=2, eval_length=64, peer_steps=None, device="cpu",
    )  # fmt: skip

    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def rounded(folder, spec, linears):
    """What a peer gives back, made by our own rounding."""
    model = load_full_precision(folder)
    weights = {}
    for each in linears:
        weight = model.get_parameter(f"{each.name}.weight")
        group_range = weight_range(weight, spec.group_size)
        weights[each.name] = fake_quantize(weight, group_range, spec.weight_grid(each.name))
    return weights


@pytest.mark.parametrize("notation", ["w3a16g32", "w4a8", "w4a6kv4"])
def test_weights_of_a_peer_are_measured_as_our_checkpoints_are(tmp_path, notation):
    spec = QuantSpec.from_notation(notation)
    _, checkpoint, _ = save_checkpoint(tmp_path, spec)
    loaded = load_checkpoint(checkpoint)
    ours = ResidentModel(architecture=loaded.architecture, skeleton=loaded.model)
    source = SourceModel.open(tmp_path / "source")
    weights = rounded(tmp_path / "source", spec, source.architecture.linears)

    peer = OverlaidModel(source=source, weights=weights, a_bits=spec.a_bits)

    measured, wanted = (
        measure_perplexity(model, TOKENS, SILENT, kv_bits=spec.kv_bits).value
        for model in (peer, ours)
    )
    assert measured == pytest.approx(wanted, rel=2e-3)
    full = measure_perplexity(source, TOKENS, SILENT).value
    assert abs(measured - full) > 10 * abs(measured - wanted)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_that_are_not_on_the_grid_are_refused(folder, bits):
    source = SourceModel.open(folder / "tiny")
    linears = source.architecture.linears
    spec = QuantSpec(w_bits=bits, group_size=32)
    weights = rounded(folder / "tiny", spec, linears)
    check_levels(weights, spec.weight_grid("x"), linears)
    finer = rounded(folder / "tiny", QuantSpec(w_bits=bits + 1, group_size=32), linears)

    with pytest.raises(ValueError, match="levels, more than"):
        check_levels(finer, spec.weight_grid("x"), linears)


def test_a_linear_that_a_peer_left_out_is_named(folder):
    source = SourceModel.open(folder / "tiny")
    linears = source.architecture.linears
    weights = rounded(folder / "tiny", QuantSpec(w_bits=4), linears)
    del weights["model.layers.1.mlp.up_proj"]

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj was not quantized"):
        check_levels(weights, QuantSpec(w_bits=4).weight_grid("x"), linears)


@pytest.mark.parametrize(("notation", "bits"), [("w2a16g32", 2 + 18 / 32), ("w4a16g64", 4.3125)])
def test_bits_of_a_peer_are_codes_scales_and_zero_points(folder, notation, bits):
    linears = SourceModel.open(folder / "tiny").architecture.linears

    assert stored_bits(grid_of(QuantSpec.from_notation(notation), linears), linears) == bits


def test_a_grid_that_peers_do_not_have_is_refused(folder):
    linears = SourceModel.open(folder / "tiny").architecture.linears

    with pytest.raises(ValueError, match=r"w2\*a8 is not possible"):
        grid_of(QuantSpec.from_notation("w2*a8"), linears)
