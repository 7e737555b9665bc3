"""The benchmark of decode attention at toy size, and what it tries."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.attention_case import CASES, TOY
from benchmarks.attention_operands import FORM, draw_operands
from benchmarks.timing import Method
from kernels.attended_tokens import attended_tokens_reference
from kernels.attention import Scoring
from kernels.attention_config import read_attention_table
from kernels.kv_pages import KvPages


def test_a_toy_is_measured_in_the_interpreter_and_its_winner_stored(tmp_path):
    command = [sys.executable, "-m", "benchmarks.attention", "--toy", "--device", "cpu"]
    options = ["--most-configs", "1", "--store", "--out", str(tmp_path)]

    subprocess.run(
        [*command, *options, "--configs", str(tmp_path / "configs")],
        check=True,
        capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )

    rows = json.loads((tmp_path / "attention-h100.json").read_text())["rows"]
    table = read_attention_table(tmp_path / "configs" / "interpreter.json")
    assert [(row["model"], row["key"]) for row in rows] == [("toy", TOY[0].key.text)]
    assert table.entries[TOY[0].key].splits == rows[0]["config"]["splits"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_launches_depend_on_the_shape_alone_and_fit_a_multiprocessor(case):
    others = [other for other in CASES if other.key == case.key]

    assert all(other.configs == case.configs for other in others)
    assert 10 <= len(case.configs) <= 26
    for config in case.configs:
        assert config.min_chunk % config.block_t == 0
        row = case.head_dim * 2 if case.bits == 16 else case.head_dim * case.bits // 8
        assert config.block_t * 2 * row * (config.num_stages - 1) <= 96 << 10


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_bytes_of_a_case_are_those_of_its_pages(case):
    pages = KvPages.allocate(1, case.kv_heads, case.head_dim, bits=case.bits)

    assert case.moved_bytes == pages.bytes_per_token * sum(case.lengths)


@pytest.mark.parametrize("field", range(4))
def test_a_wrong_field_has_no_time(field):
    operands = draw_operands(TOY[0], torch.device("cpu"), Method(rotate_bytes=0))
    codes = attended_tokens_reference(
        operands.query,
        operands.pages,
        operands.contexts[-1],
        Scoring(softmax_scale=TOY[0].head_dim ** -0.5),
        FORM,
    )
    fields = [codes.codes, codes.scale, codes.zero_point, codes.sums]

    assert operands.is_right(tuple(fields))
    fields[field] = fields[field] + (2 if field else 3)
    assert not operands.is_right(tuple(fields))
