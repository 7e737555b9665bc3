"""The calibration benchmark on a tiny shape, and the sources of every shape."""

import json

import pytest

from benchmarks import calibration
from benchmarks.shapes import SHAPES, layers_of, write_source
from engine.architecture import check_config
from engine.models.loading import SourceModel


def run(out, *options):
    calibration.main([
        "--shape", "tiny", "--spec", "w4a16g32", "--samples", "3", "--length", "32",
        "--epochs", "1", "--blocks", "2", "--device", "cpu", "--out", str(out), *options,
    ])  # fmt: skip
    record = json.loads((out / "calibration.json").read_text())
    return record, record["rows"][0]


def test_a_run_measures_every_step_of_a_layer(tmp_path, capsys):
    record, row = run(tmp_path)

    assert (row["shape"], row["spec"], row["recipe"]) == ("tiny", "w4a16g32", "default")
    assert (row["blocks_measured"], row["blocks"]) == (2, 4)
    assert row["block_seconds"] == pytest.approx(sum(row["step_seconds"].values()), abs=0.01)
    assert {"statistics", "moments", "training", "measuring", "saving"} <= row[
        "step_seconds"
    ].keys()
    assert row["hours_for_all_blocks"] == pytest.approx(4 * row["block_seconds"] / 3600, abs=1e-4)
    assert row["peak_host_bytes"] > 10**7
    assert row["peak_device_bytes"] is None
    assert row["placement"] == "host"
    assert {"hardware", "versions", "commit", "settings"} <= record.keys()
    assert "tiny" in capsys.readouterr().out


def test_a_budget_of_nothing_sends_the_chains_to_disk(tmp_path):
    record, row = run(tmp_path, "--chain-host-bytes", "0", "--recipe", "fast")

    assert row["placement"] == "disk"
    assert record["settings"]["chain_host_bytes"] == 0
    assert "training" not in row["step_seconds"]


def test_a_source_holds_the_layers_that_are_asked_for(tmp_path):
    source = SourceModel.open(write_source("tiny", 3, tmp_path))

    block = source.load_block(2)

    assert source.architecture.layers == 3
    assert block.mlp.down_proj.weight.shape == (64, 128)
    assert 0.015 < float(block.mlp.down_proj.weight.std()) < 0.025
    assert 0.9 < float(block.input_layernorm.weight.mean()) < 1.1


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("llama-7b", 6.5), ("llama-13b", 12.7), ("llama-3-8b", 7.0), ("llama-70b", 68.5),
        ("qwen2.5-7b", 6.5), ("smollm2-135m", 0.106),
    ],
)  # fmt: skip
def test_a_shape_has_the_linears_of_the_model_it_is_named_after(shape, billions):
    architecture = check_config(SHAPES[shape])

    weights = sum(each.weights for each in architecture.linears)
    assert weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert architecture.layers == layers_of(shape)
