"""The calibration process as the supervisor sees it: pipes, signals, exit codes, files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.checkpoint.manifest import digest_of, verify_directory
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
LAYERS = 3
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NOISY = """
import os, sys
import engine.pipeline as pipeline
import worker.child as child
quantize = pipeline.quantize_model
def noisy(job, watch):
    print("stray words", flush=True)
    os.write(1, b"stray bytes\\n")
    return quantize(job, watch)
pipeline.quantize_model = noisy
sys.exit(child.main(sys.argv[1:]))
"""
FULL = """
import errno, sys
import worker.child as child
def fill(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "/srv/secret/block-00000.safetensors")
child._run = fill
sys.exit(child.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("source"), layers=LAYERS)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """Records, log and digest of a run that nobody disturbs, while something prints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with started(write_job(source, folder), command=["-c", NOISY]) as child:
        records, log = rest_of(child), child.stderr.read().decode()
        assert child.wait(60) == 0, log
    return records, log, digest_of(folder / "out")


def write_job(source, folder, **changes):
    record = {
        "source_dir": str(source),
        "out_dir": str(folder / "out"),
        "state_dir": str(folder / "state"),
        "spec": {
            "w_bits": 4,
            "a_bits": 8,
            "calibration": {"samples": 4, "length": 32, "epochs": 6},
        },
        "source": {"repo": "acme/tiny", "revision": "f" * 40},
        "calibration_text": None,
        "evaluation": {"enabled": True, "windows": 2, "length": 32},
        "evaluation_text": None,
        "threads": 1,
        "device": "cpu",
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(record))
    return folder / "job.json"


@contextlib.contextmanager
def started(job_file, command=("-m", "worker.child"), environment=ENVIRONMENT):
    child = subprocess.Popen(
        [sys.executable, *command, str(job_file)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()


def rest_of(child):
    return [json.loads(line) for line in child.stdout]


def wait_for(child, kind):
    for line in child.stdout:
        record = json.loads(line)
        if record["type"] == kind:
            return record
    pytest.fail(f"the child ended without {kind}: {child.stderr.read().decode()}")


def test_every_line_is_a_record_and_the_last_one_is_the_report(undisturbed):
    records, _, digest = undisturbed

    kinds = [record["type"] for record in records]
    assert kinds.count("result") == 1
    assert kinds[-1] == "result"
    assert kinds.count("layer.finished") == LAYERS
    report = records[-1]["report"]
    assert report["manifest_sha256"] == digest
    assert report["layers"] == LAYERS
    assert report["evaluation_status"] == "succeeded"
    assert report["perplexity"].keys() == {"fp", "quant", "tokens"}


def test_whatever_else_prints_goes_to_the_log(undisturbed):
    _, log, _ = undisturbed

    assert "stray words" in log
    assert "stray bytes" in log


def test_a_killed_child_resumes_behind_its_last_block_with_the_same_digest(
    source, undisturbed, tmp_path
):
    job_file = write_job(source, tmp_path)
    with started(job_file) as child:
        wait_for(child, "checkpoint.saved")
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()

    with started(job_file) as child:
        records = rest_of(child)
        assert child.wait(60) == 0

    finished = [record for record in records if record["type"] == "layer.finished"]
    assert finished[0]["resumed"]
    assert not finished[-1]["resumed"]
    verify_directory(tmp_path / "out")
    assert digest_of(tmp_path / "out") == undisturbed[2]


def test_sigterm_stops_at_the_next_step_and_keeps_the_blocks(source, tmp_path):
    with started(write_job(source, tmp_path)) as child:
        wait_for(child, "checkpoint.saved")
        child.terminate()
        records = rest_of(child)
        assert child.wait(30) == 128 + signal.SIGTERM

    assert records[-1]["type"] == "error"
    assert records[-1]["code"] == "calibration_interrupted"
    assert (tmp_path / "state" / "block-00000.json").is_file()
    assert not (tmp_path / "out").exists()


def test_the_end_of_standard_input_ends_the_child_at_once(source, tmp_path):
    with started(write_job(source, tmp_path)) as child:
        wait_for(child, "layer.started")
        child.stdin.close()
        records = rest_of(child)
        assert child.wait(60) == 3

    assert not {"result", "error"} & {record["type"] for record in records}


def test_a_supervisor_that_dies_before_torch_is_there_leaves_no_orphan(source, tmp_path):
    path = tmp_path / "path"
    path.mkdir()
    (path / "torch.py").write_text("import time\ntime.sleep(600)\n")
    environment = ENVIRONMENT | {"PYTHONPATH": str(path)}

    with started(write_job(source, tmp_path), environment=environment) as child:
        child.stdin.close()
        assert child.wait(60) == 3

    assert not (tmp_path / "state").exists()


def test_a_diverging_layer_is_named_in_the_last_record(tmp_path):
    source = save_tiny_model(tmp_path / "source", layers=LAYERS)
    weights = load_file(source / "model.safetensors")
    # the largest finite weights: rotated they are not
    weights["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    with started(write_job(source, tmp_path)) as child:
        records = rest_of(child)
        assert child.wait(60) == 1

    assert records[-1]["code"] == "calibration_diverged"
    assert records[-1]["layer"] == "model.layers.1.mlp.down_proj"
    assert (tmp_path / "state" / "block-00000.json").is_file()


def test_a_job_that_is_not_possible_ends_with_the_engines_code_though_its_supervisor_hangs_up(
    source, tmp_path
):
    with started(write_job(source, tmp_path, spec={"w_bits": 9})) as child:
        first = json.loads(child.stdout.readline())
        child.stdin.close()
        assert rest_of(child) == []
        assert child.wait(60) == 1

    assert (first["type"], first["code"]) == ("error", "invalid_spec")
    assert "w_bits = 9" in first["message"]


def test_a_full_disk_ends_the_child_with_its_code(tmp_path):
    with started(write_job(tmp_path / "source", tmp_path), command=["-c", FULL]) as child:
        records = rest_of(child)
        assert child.wait(60) == 1

    assert records[-1]["code"] == "disk_full"
    assert "secret" not in records[-1]["message"]
