"""`python -m engine`, called as a person would."""

import re

import pytest

from engine.__main__ import main
from engine.checkpoint.manifest import read_manifest
from engine.target import BitTarget
from tests.tiny_models import save_tiny_model

SMALL = ["--samples", "3", "--length", "32", "--epochs", "1", "--eval-windows", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def run(*arguments):
    return main(["--device", "cpu", *map(str, arguments)])


def test_a_model_is_quantized_and_measured_again(source, tmp_path, capsys):
    out = tmp_path / "out"

    code = run("quantize", source, out, "--spec", "w3a8g32", *SMALL, "--eval-length", 48)
    quantized = capsys.readouterr()
    run("perplexity", out, "--eval-windows", 2, "--eval-length", 48)
    measured = capsys.readouterr()

    assert code == 0
    assert re.search(r"bits_per_weight\W+3\.75", quantized.out)
    assert "model.layers.1" in quantized.err
    perplexity = read_manifest(out).evaluation.perplexity.quant
    assert f"perplexity {perplexity:.4f} over 94 tokens" in measured.out


def test_hidden_states_are_sent_to_disk_where_they_may_take_no_memory(source, tmp_path, capsys):
    sizes = ("--chain-device-bytes", 0, "--chain-host-bytes", 0)

    code = run("quantize", source, tmp_path / "out", "--recipe", "rtn", *SMALL[:-1], 0, *sizes)

    assert code == 0
    assert "kept on disk" in capsys.readouterr().err


def test_the_source_is_measured_in_full_precision(source, capsys):
    assert run("perplexity", source, "--eval-windows", 1, "--eval-length", 32) == 0

    assert "over 31 tokens" in capsys.readouterr().out


def test_windows_that_predict_nothing_are_refused(source, tmp_path, capsys):
    assert run("perplexity", source, "--eval-length", 1) == 1
    assert run("quantize", source, tmp_path / "out", *SMALL, "--eval-length", 1) == 1

    assert capsys.readouterr().err.count("evaluation.length = 1") == 2
    assert not (tmp_path / "out").exists()


def test_nothing_is_measured_when_nothing_is_asked_for(source, tmp_path):
    run("quantize", source, tmp_path / "out", "--recipe", "rtn", *SMALL[:-1], 0)

    assert read_manifest(tmp_path / "out").evaluation.status == "skipped"


@pytest.mark.parametrize(
    ("option", "goal"),
    [
        (("--target-bits", 3.5), {"average_bits": 3.5}),
        (("--target-bytes", 120_000), {"max_bytes": 120_000}),
        (("--target-increase", 0.1), {"perplexity_increase": 0.1}),
    ],
)
def test_a_target_searches_the_bits_of_every_layer(source, tmp_path, capsys, option, goal):
    choices = ("--w-choices", 2, 3, 4, 8, "--a-choices", 6, 8)

    code = run("quantize", source, tmp_path / "out", *option, *choices, *SMALL[:-1], 0)

    manifest = read_manifest(tmp_path / "out")
    assert code == 0
    assert manifest.spec.target == BitTarget(**goal, w_choices=(2, 3, 4, 8), a_choices=(6, 8))
    expected = f"{manifest.search.predicted_average_bits:.3f} bits per weight, expected KL"
    assert expected in capsys.readouterr().err


def test_a_target_out_of_reach_is_explained(source, tmp_path, capsys):
    code = run("quantize", source, tmp_path / "out", "--target-bits", 1.5, *SMALL)

    assert code == 1
    assert "target.average_bits = 1.5 is not possible" in " ".join(capsys.readouterr().err.split())


def test_a_spec_that_does_not_fit_is_explained(source, tmp_path, capsys):
    code = run("quantize", source, tmp_path / "out", "--spec", "w4a8g96", *SMALL)

    assert code == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "invalid_spec: group_size = 96 is not possible" in told
    assert "use -1, 32, 64" in told


def test_a_missing_gguf_file_is_explained(tmp_path, capsys):
    assert run("import-gguf", tmp_path / "none.gguf", tmp_path / "out") == 1

    assert "none.gguf does not exist" in capsys.readouterr().err
