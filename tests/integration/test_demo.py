"""The demo from end to end, with a tiny model in the place of the packaged one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from api.cli.demo_model import MODEL_NAME
from tests.integration.machine import ROOT
from tests.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.slow

KEYS = [
    "model", "w_bits", "a_bits", "group_size", "ppl_fp", "ppl_quant", "bits_per_weight",
    "bytes_fp", "bytes_quant", "seconds", "generated_text", "manifest_ok",
]  # fmt: skip


@pytest.fixture
def home(tmp_path):
    save_tiny_llama(tmp_path / "models" / MODEL_NAME, positions=4096)
    return tmp_path


def run_demo(home, *options):
    return subprocess.run(
        [sys.executable, "-m", "api.cli", "demo", "--home", home, "--json", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def processes_of(home):
    """Processes that serve this demo's data directory."""
    mark = f"ABQ_DATA_DIR={home / 'data'}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_the_demo_reports_what_it_measured_and_leaves_nothing_running(home):
    done = run_demo(home, "--spec", "w3a8g32")

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == KEYS
    assert report == json.loads((home / "report.json").read_text())
    assert (report["w_bits"], report["a_bits"], report["group_size"]) == (3, 8, 32)
    assert report["bits_per_weight"] == 3 + 24 / 32
    assert report["bytes_quant"] < report["bytes_fp"]
    assert report["ppl_fp"] > 1
    assert report["ppl_quant"] > 1
    assert report["manifest_ok"] is True
    assert processes_of(home) == []


def test_a_failing_demo_says_why_and_leaves_nothing_running(home):
    path = home / "models" / MODEL_NAME / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})

    done = run_demo(home)

    assert done.returncode == 1
    assert "the job is failed" in done.stderr
    assert "worker.log" in done.stderr
    assert not (home / "report.json").exists()
    assert processes_of(home) == []
