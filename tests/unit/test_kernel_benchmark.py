"""The kernel benchmark and the tuner at toy size, and what they refuse."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from benchmarks import kernel_products, kernels, tokens, tune
from benchmarks.budget import Budget
from benchmarks.kernel_candidates import candidate_plans
from benchmarks.kernel_case import GOALS, HEADS, LAYERS, TOY, KernelCase, all_cases
from benchmarks.kernel_operands import copy_tensors, draw_operands, make_check, tensor_bytes
from benchmarks.kernel_rivals import RIVALS
from benchmarks.timing import Method, WrongResultError, copies_to_rotate, time_launches
from benchmarks.token_products import TOY_TOKEN_CASES, TokenOp, prepare_tokens
from benchmarks.warming import run_ahead
from kernels.linear import Plan
from kernels.sliced_reference import sliced_linear_reference
from kernels.tables import Route, read_table
from kernels.tile_config import LaunchConfig

CPU = torch.device("cpu")
TOY_METHOD = Method(rotate_bytes=0, replays=2)
CASES = len(TOY) + len(TOY_TOKEN_CASES)
ROW = {
    "op", "n", "k", "m", "w_bits", "a_bits", "group_size", "us", "gbps", "tops", "roofline_us",
    "cublas_bf16_us", "rivals", "exact",
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def wrong_reference(tokens, weight, bias=None, *, out_dtype):
    out = sliced_linear_reference(tokens, weight, bias, out_dtype=out_dtype)
    out[-1, -1] = torch.nextafter(out[-1, -1], out.new_tensor(float("inf")))
    return out


def run_toy(out, *options):
    kernels.main(["--toy", "--device", "cpu", "--out", str(out), *options])
    return json.loads((out / "kernels-h100.json").read_text())


# the benchmark


def test_the_toy_run_measures_every_case_exactly(tmp_path, capsys):
    record = run_toy(tmp_path)

    assert {"hardware", "versions", "commit", "rows"} <= record.keys()
    assert [set(row) for row in record["rows"]] == [ROW] * CASES
    assert all(row["exact"] and row["us"] > 0 for row in record["rows"])
    assert all(row["cublas_bf16_us"] > 0 for row in record["rows"][: len(TOY)])
    assert [row["op"] for row in record["rows"][len(TOY) :]] == list(TokenOp)
    assert f"{CASES} of {CASES} products" in capsys.readouterr().out


def test_the_toy_run_of_gates_has_a_time_for_each(capsys):
    tokens.main(["--toy", "--device", "cpu"])

    printed = capsys.readouterr().out
    assert all(case.label in printed for case in tokens.TOY)


def test_a_gate_that_is_not_right_has_no_time(monkeypatch):
    monkeypatch.setattr(tokens, "_is_equal", lambda *_: False)

    with pytest.raises(WrongResultError, match="96 m1"):
        tokens.main(["--toy", "--device", "cpu"])


def test_what_a_decoder_launches_for_a_gate_is_measured():
    assert all(case.chosen in case.configs for case in tokens.CASES)


def test_a_rival_that_is_not_installed_has_no_time(tmp_path):
    record = run_toy(tmp_path, "--rivals", "humming", "gemlite")

    assert all(
        row["rivals"] == {"humming": None, "gemlite": None} and row["cublas_bf16_us"] is None
        for row in record["rows"][: len(TOY)]
    )


def test_a_rival_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(RIVALS, "int_mm", fail)

    record = run_toy(tmp_path, "--rivals", "int_mm")

    assert [row["rivals"] for row in record["rows"][: len(TOY)]] == [{"int_mm": None}] * len(TOY)
    assert "no such kernel" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_products, "sliced_linear_reference", wrong_reference)

    with pytest.raises(SystemExit, match=f"2 of {CASES} products are wrong"):
        run_toy(tmp_path, "--rivals")

    rows = json.loads((tmp_path / "kernels-h100.json").read_text())["rows"]
    wrong = [row for row in rows if not row["exact"]]
    assert [(row["us"], row["gbps"], row["tops"]) for row in wrong] == [(None, None, None)] * 2


def test_no_budget_measures_nothing(tmp_path):
    run = kernels.Run(
        device=CPU, method=TOY_METHOD, budget=Budget(0), rivals=(), workers=0, console=Console()
    )

    assert list(kernels.measure_cases(TOY, run)) == []


def test_a_run_stops_when_its_budget_is_spent():
    clock = Clock()

    class Slow(Console):
        def print(self, *_, **__):
            clock.now += 10

    run = kernels.Run(
        device=CPU, method=TOY_METHOD, budget=Budget(25, clock=clock, reserve=0), rivals=(),
        workers=0, console=Slow(file=StringIO()),
    )  # fmt: skip

    assert len(list(kernels.measure_cases(TOY, run))) == 3


def test_a_kernel_that_fails_is_a_row_without_a_time(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no such tile")

    monkeypatch.setattr(kernel_products, "sliced_linear_reference", fail)

    with pytest.raises(SystemExit, match="products are wrong"):
        run_toy(tmp_path, "--rivals")

    rows = json.loads((tmp_path / "kernels-h100.json").read_text())["rows"]
    assert (rows[0]["op"], rows[0]["us"], rows[0]["exact"]) == ("failed", None, False)
    assert "no such tile" in capsys.readouterr().out


# the cases


def test_goals_come_first_and_no_case_twice():
    cases = all_cases()

    assert cases[: len(GOALS)] == GOALS
    assert len(set(cases)) == len(cases)
    shapes = {s for each in LAYERS.values() for s in each} | {(n, 4096) for n, _ in HEADS}
    assert {(case.n, case.k) for case in cases} == shapes


@pytest.mark.parametrize(
    ("case", "us"),
    [
        (KernelCase(n=22016, k=4096, m=1, w_bits=2), 7.6),
        (KernelCase(n=22016, k=4096, m=1, w_bits=4), 15.1),
        (KernelCase(n=22016, k=4096, m=128, w_bits=3), 13.4),
        (KernelCase(n=57344, k=8192, m=2048, w_bits=4), 972),
        (KernelCase(n=22016, k=4096, m=2048, w_bits=4, a_bits=16), 373),
        (KernelCase(n=4096, k=4096, m=2048, w_bits=2, a_bits=2), 26.3),
    ],
)
def test_rooflines_are_those_of_the_kernel_notes(case, us):
    assert case.roofline_us == pytest.approx(us, rel=0.02)


# budget and timing


def test_a_budget_refuses_what_took_longer_than_is_left():
    clock = Clock()
    budget = Budget(100, clock=clock, reserve=10)

    with budget.spend("long"):
        clock.now += 50

    assert budget.remaining_s() == 40
    assert not budget.allows("long")
    assert budget.allows("unknown", guess_s=40)
    assert not budget.allows("unknown", guess_s=41)


def test_a_budget_remembers_work_that_failed():
    clock = Clock()
    budget = Budget(100, clock=clock, reserve=0)

    def fail():
        with budget.spend("failing"):
            clock.now += 60
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert not budget.allows("failing")


def test_one_wrong_output_among_all_leaves_no_time():
    outputs = [torch.zeros(2), torch.zeros(2), torch.ones(2)]

    with pytest.raises(WrongResultError, match="1 of 1"):
        time_launches(lambda index: outputs[index], 3, lambda out: not out.any(), TOY_METHOD)


def test_copies_fill_more_than_a_cache():
    method = Method(rotate_bytes=128 << 20)

    assert copies_to_rotate(4 << 20, method) == 32
    assert copies_to_rotate(1 << 30, method) == 2


# compiling ahead


def test_other_processes_answer_in_the_order_of_their_tasks():
    assert run_ahead(math.sqrt, [4.0, 9.0], workers=2, seconds=60) == [2.0, 3.0]
    assert run_ahead(math.sqrt, [4.0], workers=0, seconds=60) == [None]


@pytest.mark.parametrize(("seconds", "patience_s"), [(0.5, 60), (60, 0.5)])
def test_nobody_waits_for_a_process_that_hangs(seconds, patience_s):
    assert run_ahead(
        time.sleep, [120], workers=1, seconds=seconds, patience_s=patience_s
    ) == [None]  # fmt: skip


# the check


@pytest.mark.parametrize("case", TOY[:2])
def test_a_single_unit_in_the_last_place_is_seen(case):
    operands = draw_operands(case, CPU)
    out = sliced_linear_reference(operands.tokens, operands.weight, out_dtype=torch.bfloat16)
    check = make_check(operands, torch.bfloat16)

    assert check(out)
    for value in (torch.nextafter(out[0, 0], torch.zeros_like(out[0, 0])), float("nan")):
        changed = out.clone()
        changed[0, 0] = value
        assert not check(changed)


def test_groups_have_the_room_of_their_sum_in_float32_and_no_more():
    operands = draw_operands(replace(TOY[2], k=1024), CPU)
    out = sliced_linear_reference(operands.tokens, operands.weight, out_dtype=torch.float32)
    check = make_check(operands, torch.float32)

    assert check(out)
    assert not check(out * (1 + 2.0**-14))


def test_another_shape_or_dtype_is_wrong():
    operands = draw_operands(TOY[0], CPU)
    out = sliced_linear_reference(operands.tokens, operands.weight, out_dtype=torch.bfloat16)
    check = make_check(operands, torch.bfloat16)

    assert not check(out.float())
    assert not check(out[:, :-1])


def test_weights_of_16_bits_are_held_to_one_rounding():
    operands = draw_operands(TOY[3], CPU)
    check = make_check(operands, torch.bfloat16)
    w = operands.dequantized()
    exact = operands.x.double() @ w.t()

    assert check((operands.x.double() @ w.bfloat16().double().t()).bfloat16())
    assert not check((exact * 1.05).bfloat16())


def test_a_copy_shares_nothing():
    weight = draw_operands(TOY[1], CPU).weight

    copied = copy_tensors(weight)

    assert tensor_bytes(copied) == tensor_bytes(weight)
    assert all(torch.equal(a, b) for a, b in zip(copied.fields, weight.fields, strict=True))
    assert copied.fields[0].data_ptr() != weight.fields[0].data_ptr()


@pytest.mark.parametrize("case", TOY_TOKEN_CASES)
def test_tokens_are_held_to_every_bit_that_is_written(case):
    prepared = prepare_tokens(case, CPU)
    output = prepared.launch(1)

    assert prepared.check(output)
    for index, part in enumerate(output):
        changed = [each.clone() for each in output]
        changed[index].view(-1)[-1] = part.view(-1)[-1] + 1
        assert not prepared.check(tuple(changed))


# the tuner


@pytest.fixture
def planned(monkeypatch):
    """Three plans for every case: slow, wrong, fast; what is launched is the reference."""
    clock = {"slow": 0, "wrong": 0, "fast": 0}
    plans = [Plan(route=Route.TILE, config=tile_config(each)) for each in (2, 3, 4)]
    monkeypatch.setattr(tune, "candidate_plans", lambda case, **_: plans)

    def launch(plan, tokens, weight, *, out_dtype, counters):
        stages = plan.config.num_stages
        if stages == 2:
            sum(range(2_000_000))
        clock["launches"] = clock.get("launches", 0) + 1
        reference = wrong_reference if stages == 3 else sliced_linear_reference
        return reference(tokens, weight, out_dtype=out_dtype)

    monkeypatch.setattr(kernel_products, "launch_plan", launch)
    return clock


def tile_config(stages):
    return LaunchConfig(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=stages)


def tune_toy(out, *options):
    tune.main(["--toy", "--device", "cpu", "--out", str(out), *options])
    return read_table(out / "interpreter.json")


def test_the_fastest_right_launch_goes_into_the_table(tmp_path, planned):
    table = tune_toy(tmp_path, "--widths", "2")

    (entry,) = table.entries.values()
    assert entry.key == TOY[0].key
    assert (entry.route, entry.config["num_stages"]) == (Route.TILE, 4)


def test_what_the_table_has_is_not_measured_again(tmp_path, planned):
    tune_toy(tmp_path, "--widths", "2")
    planned["launches"] = 0

    table = tune_toy(tmp_path, "--widths", "2", "3")

    assert len(table.entries) == 2
    first = planned["launches"]
    tune_toy(tmp_path, "--widths", "2", "3")
    assert planned["launches"] == first
    tune_toy(tmp_path, "--widths", "2", "--again")
    assert planned["launches"] > first


def test_a_shape_without_a_right_launch_stays_out_of_the_table(tmp_path, planned, monkeypatch):
    monkeypatch.setattr(kernel_products, "sliced_linear_reference", None)
    monkeypatch.setattr(
        tune, "candidate_plans", lambda case, **_: [Plan(route=Route.TILE, config=tile_config(3))]
    )

    tune.main(["--toy", "--device", "cpu", "--out", str(tmp_path), "--widths", "2"])

    assert not (tmp_path / "interpreter.json").exists()


@pytest.mark.parametrize(
    ("case", "routes"),
    [
        (KernelCase(n=4096, k=4096, m=1, w_bits=2), {"decode", "tile", "binary"}),
        (KernelCase(n=4096, k=11008, m=8, w_bits=7), {"decode", "tile", "binary"}),
        (KernelCase(n=4096, k=4096, m=32, w_bits=4), {"tile", "prefill"}),
        (KernelCase(n=4096, k=4096, m=2048, w_bits=4), {"tile", "prefill", "unpacked"}),
        (KernelCase(n=4096, k=4096, m=2048, w_bits=4, group_size=128), {"tile", "prefill"}),
        (KernelCase(n=4096, k=4096, m=2048, w_bits=4, group_size=32), {"tile"}),
        (
            KernelCase(n=4096, k=4096, m=2048, w_bits=2, a_bits=2),
            {"tile", "prefill", "unpacked", "binary"},
        ),
        (KernelCase(n=4096, k=4096, m=1, w_bits=4, a_bits=16), {"half", "half_decode"}),
        (KernelCase(n=4096, k=4096, m=16, w_bits=4, a_bits=16), {"half"}),
    ],
)
def test_every_kernel_that_can_answer_proposes_launches(case, routes):
    plans = candidate_plans(case)

    assert {plan.route.value for plan in plans} == routes
    assert len(set(plans)) == len(plans)
    # what the interpreter cannot run is left out there
    interpreted = {plan.route.value for plan in candidate_plans(case, interpreted=True)}
    assert interpreted == routes & {"decode", "tile"}


def test_real_kernels_are_tuned_in_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tune", "--toy", "--device", "cpu"]
    options = ["--most-plans", "1", "--widths", "2", "3", "--out", str(tmp_path)]

    subprocess.run(
        [*command, *options],
        check=True,
        capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )

    entries = read_table(tmp_path / "interpreter.json").entries.values()
    assert [entry.route for entry in entries] == [Route.DECODE, Route.TILE]
