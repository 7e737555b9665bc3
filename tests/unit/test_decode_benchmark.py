"""The benchmarks of the runtime at toy size, and how they split and count."""

import ast
import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import decode, decode_measurement, serve
from benchmarks.budget import Budget
from benchmarks.decode_case import CASES, GOALS, TOY, DecodeCase, Phase
from benchmarks.random_model import VOCABULARIES, make_random_model, real_config
from benchmarks.serve_case import TOY as TOY_LOADS
from benchmarks.step_split import KernelRun, Part, split_runs
from engine.architecture import check_config
from engine.spec import QuantSpec

CPU = torch.device("cpu")
KERNELS = Path(__file__).parents[2] / "kernels"
ROW = {
    "engine", "shape", "config", "kv_bits", "head_bits", "phase", "batch", "context",
    "tokens_per_s", "ms_per_step", "bound_ms", "weight_gb", "graph_gb", "goal", "split",
}  # fmt: skip
LINEAR_FILES = {
    "_binary_linear_kernel", "_binary_prefill_kernel", "_decode_kernel", "_half_decode_kernel",
    "_prefill_groups_kernel", "half_linear", "int_linear", "prefill_linear", "tile_linear",
    "unpack",
}  # fmt: skip
ATTENTION_FILES = {"paged_attention", "attention_chunks", "attended_tokens", "paged_prefill"}
CALIBRATION_FILES = {"activation_rounding", "column_rounding"}


# the commands


def test_the_toy_run_measures_every_case_beside_transformers(tmp_path, capsys):
    decode.main(["--toy", "--device", "cpu", "--rival", "--out", str(tmp_path)])

    record = json.loads((tmp_path / "decode-h100.json").read_text())
    assert {"hardware", "versions", "commit", "settings"} <= record.keys()
    rows = record["rows"]
    assert [set(row) for row in rows] == [ROW] * (len(TOY) + 1)
    assert [(row["config"], row["kv_bits"]) for row in rows] == [
        ("w2a8", 16), ("w4a8", 8), ("w4a16", 16), ("bf16", 16)
    ]  # fmt: skip
    for row, case in zip(rows, TOY, strict=False):
        assert row["tokens_per_s"] > 0
        tokens = case.context if case.phase is Phase.PREFILL else case.batch
        assert row["ms_per_step"] * row["tokens_per_s"] == pytest.approx(tokens * 1e3, rel=0.01)
    assert f"{len(TOY)} of {len(TOY)} cases" in capsys.readouterr().out


def test_the_toy_load_has_a_row_for_every_case(tmp_path):
    serve.main(["--toy", "--device", "cpu", "--sequences", "4", "--out", str(tmp_path)])

    rows = json.loads((tmp_path / "serve-h100.json").read_text())["rows"]
    assert [row["requests"] for row in rows] == [case.requests for case in TOY_LOADS]
    for row in rows:
        assert 0 < row["first_token_ms"] <= row["first_token_ms_p99"]
        assert 0 < row["between_tokens_ms"] <= row["between_tokens_ms_p99"]
        assert row["tokens_per_s"] > 0
        assert row["kv_bits"] == 8


def run_of(budget, console=None):
    return decode.Run(
        device=CPU, budget=budget, console=console or Console(file=StringIO()), launch_pdl=False,
        rival=False,
    )  # fmt: skip


def test_no_budget_measures_nothing():
    assert list(decode.measure_cases(TOY, run_of(Budget(0)))) == []


def test_a_case_that_fails_ends_no_other(monkeypatch):
    console = Console(file=StringIO())
    real = decode_measurement.measure_case

    def fail_at_once(case, model):
        if case is TOY[0]:
            raise RuntimeError("no such kernel")
        return real(case, model)

    monkeypatch.setattr(decode, "measure_case", fail_at_once)

    rows = list(decode.measure_cases(TOY[::2], run_of(Budget(60), console)))

    assert [row["config"] for row in rows] == ["w4a16"]
    assert "no such kernel" in console.file.getvalue()


def test_goals_come_first_and_no_case_twice():
    assert CASES[: len(GOALS)] == GOALS
    assert len(set(CASES)) == len(CASES)
    assert all(case.goal for case in GOALS)


def test_cases_that_differ_in_the_cache_alone_share_a_model():
    case = DecodeCase(shape="toy", config="w4a8kv8")

    assert case.model_key == DecodeCase(shape="toy", config="w4a8").model_key
    assert case.model_key != DecodeCase(shape="toy", config="w4a8", head_bits=8).model_key
    assert case.spec.kv_bits == 8


# models


@pytest.mark.parametrize(
    ("shape", "billions"), [("llama-7b", 6.74), ("llama-3-8b", 8.03), ("qwen2.5-7b", 7.62)]
)
def test_shapes_are_those_of_the_models(shape, billions):
    architecture = check_config(real_config(shape))

    assert architecture.parameter_count / 1e9 == pytest.approx(billions, abs=0.01)
    assert architecture.vocab == VOCABULARIES[shape]


@pytest.mark.parametrize("notation", ["w2a8", "w4a16g64"])
def test_random_weights_have_the_spread_of_real_ones(notation):
    spec = QuantSpec.from_notation(notation)
    loaded = make_random_model("toy", spec, CPU, torch.float32)

    layer = loaded.model.get_submodule(loaded.architecture.linears[0].name)
    weight = layer.dequantized()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert layer.a_bits == spec.a_bits
    again = make_random_model("toy", spec, CPU, torch.float32)
    assert torch.equal(layer.codes(), again.model.get_submodule(
        loaded.architecture.linears[0].name).codes())  # fmt: skip


# the split


def test_moments_belong_to_the_kernel_that_started_first():
    runs = [
        KernelRun(name="decode_linear_kernel", start_us=0, us=10),
        # started early, and waits for the product until it ends
        KernelRun(name="token_kernel", start_us=4, us=9),
        # wholly within
        KernelRun(name="_decode_kernel", start_us=5, us=2),
        KernelRun(name="_decode_kernel", start_us=20, us=5),
    ]

    split = split_runs(runs, steps=1, ms_per_step=0.030)

    assert split.to_json() == {
        "linear_ms": 0.01, "attention_ms": 0.005, "other_ms": 0.003, "gaps_ms": 0.012,
        "launches": 4,
    }  # fmt: skip


def test_a_step_is_a_part_of_what_was_watched():
    runs = [KernelRun(name="nvjet_tst", start_us=10 * i, us=8) for i in range(6)]

    split = split_runs(runs, steps=3, ms_per_step=0.010)

    assert split.parts_ms[Part.LINEAR] == pytest.approx(0.016)
    assert (split.gaps_ms, split.launches) == (0.0, 2)


@pytest.mark.parametrize(("grid", "part"), [((40, 8, 1), "attention"), ((132, 1, 1), "linear")])
def test_prefill_kernels_of_one_name_are_told_apart_by_their_grids(grid, part):
    assert KernelRun(name="_prefill_kernel", start_us=0, us=1, grid=grid).part == part


def test_every_kernel_of_ours_belongs_to_its_part():
    named = {
        node.name: file.stem
        for file in KERNELS.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert len(named) > 20

    for name, file in named.items():
        if file in CALIBRATION_FILES or name == "_prefill_kernel":
            continue
        wanted = Part.LINEAR if file in LINEAR_FILES else Part.OTHER
        wanted = Part.ATTENTION if file in ATTENTION_FILES else wanted
        assert KernelRun(name=name, start_us=0, us=1).part is wanted, (file, name)
