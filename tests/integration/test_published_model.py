"""A model goes all the way: fake Hub, quantized, pushed, and loaded again by another process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from api.db.tables.jobs import Job
from api.hub.routing import create_hub
from api.services.preflight import preflight
from api.settings import HubSettings, Settings
from engine.calibration.watch import Watch
from engine.checkpoint.reader import load_checkpoint
from engine.evaluation.comparison import EvaluationPlan
from engine.pipeline import QuantJob, quantize_model
from engine.spec import CalibrationSpec, QuantSpec, Recipe
from tests.fake_hub import WRITER
from tests.tiny_llama import save_tiny_llama
from worker.fetch import fetch_source
from worker.publish import publish_to_hub

# huggingface_hub uploads with an argument that its own HTTP client deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TARGET = "acme/tiny-w3a8"
SPEC = QuantSpec(
    w_bits=3,
    a_bits=8,
    group_size=32,
    recipe=Recipe.RTN,
    calibration=CalibrationSpec(samples=2, length=32, epochs=0),
)
PROMPT = [5, 17, 42, 99, 3, 64, 7]
RELOAD = """
import json, sys
from pathlib import Path
import torch
from huggingface_hub import snapshot_download
from engine.checkpoint.manifest import verify_directory
from engine.checkpoint.reader import load_checkpoint

repo_id, endpoint, token, folder, prompt = sys.argv[1:]
snapshot_download(repo_id, revision="job_01", local_dir=folder, endpoint=endpoint, token=token)
verify_directory(Path(folder))
with torch.no_grad():
    logits = load_checkpoint(Path(folder)).model(torch.tensor([json.loads(prompt)])).logits
print(json.dumps(logits[0].tolist()))
"""


class Service:
    """One request on its way, without queue and database."""

    def __init__(self, fake_hub, folder):
        self.folder = folder
        self.settings = Settings(
            data_dir=folder / "data", hub=HubSettings(endpoint=fake_hub.url, token=WRITER)
        )
        self.hub = create_hub(self.settings)
        self.target = {"repo_id": TARGET, "private": True}

    def run(self):
        checked = preflight(
            self.hub,
            self.settings,
            model="acme/tiny",
            revision=None,
            spec=SPEC,
            publish=self.target,
        )
        job = Job(
            id="job_01",
            model="acme/tiny",
            source_sha=checked.resolved.sha,
            publish=self.target,
        )
        fetch_source(self.hub, job, self.folder / "source", lambda done, total: None)
        out = self.folder / "out"
        quantize_model(self._describe(job, out), Watch(on_event=lambda event: None))
        publish_to_hub(self.hub, job, out, lambda: None)
        return checked, out

    def _describe(self, job, out):
        return QuantJob(
            source_dir=self.folder / "source",
            out_dir=out,
            state_dir=self.folder / "state",
            spec=SPEC,
            repo=job.model,
            revision=job.source_sha,
            evaluation=EvaluationPlan(enabled=False),
        )


@pytest.fixture
def service(fake_hub, tmp_path):
    model = save_tiny_llama(tmp_path / "model", initializer_range=0.05)
    fake_hub.add("acme/tiny", {path.name: path.read_bytes() for path in model.iterdir()})
    return Service(fake_hub, tmp_path)


def test_the_pushed_model_reloads_with_identical_logits_in_a_fresh_process(
    fake_hub, service, tmp_path
):
    _, out = service.run()
    with torch.no_grad():
        logits = load_checkpoint(out).model(torch.tensor([PROMPT])).logits[0]

    copy = tmp_path / "copy"
    arguments = [TARGET, fake_hub.url, WRITER, str(copy), json.dumps(PROMPT)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", RELOAD, *arguments],
        check=True,
        capture_output=True,
        timeout=120,
        env=environment,
    )

    reloaded = torch.tensor(json.loads(process.stdout.splitlines()[-1]))
    assert torch.equal(reloaded, logits)


def test_the_result_is_what_the_estimate_promised(service):
    checked, out = service.run()

    bits = json.loads((out / "abq_manifest.json").read_text())["bits"]
    assert bits["per_weight"] == pytest.approx(checked.estimate["promised_bits_per_weight"])
    stored = bits["packed_bytes"] + bits["other_bytes"] + bits["embedding_bytes"]
    assert stored == pytest.approx(checked.estimate["artifact_bytes"], rel=0.01)
    used = sum(path.stat().st_size for path in service.folder.rglob("*.safetensors"))
    assert used <= checked.estimate["disk_needed_bytes"] + bits["fp_bytes"]
