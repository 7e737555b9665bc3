"""`python -m benchmarks.case_measurement CASE.json ROW.json`: one row, in a process of its own.

Ours and the peers' results go through the same evaluation, over the same windows, in float32.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import RECIPES, Case, Method
from benchmarks.peers.autoround import AutoRoundPeer
from benchmarks.peers.base import Peer, PeerJob, check_levels, grid_of, stored_bits
from benchmarks.peers.gptq import GptqPeer
from benchmarks.peers.overlaid import OverlaidModel
from engine.calibration.dataset import (
    BuiltinText,
    consecutive_windows,
    load_tokenizer,
    read_text,
    sample_windows,
    tokenize,
)
from engine.calibration.watch import Watch
from engine.checkpoint.evaluation import Divergence
from engine.evaluation.chain import Chain
from engine.evaluation.divergence import compare_chains
from engine.evaluation.plan import EvaluationPlan, EvaluationText
from engine.events import EvaluationResult, Event, LayerFinished, Stage, StageStarted
from engine.models.loading import SourceModel
from engine.pipeline import QuantJob, quantize_model

__all__ = ["main", "measure_case"]

BEST_STEPS = 1000
PEERS: dict[Method, Peer] = {
    Method.AUTOROUND: AutoRoundPeer(),
    Method.AUTOROUND_BEST: AutoRoundPeer(default_steps=BEST_STEPS),
    Method.GPTQ: GptqPeer(),
}
MISSING = "the package of this method is not installed; install the extra `bench`"
SILENT = Watch(on_event=lambda _: None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the case of a file and write its row."""
    case_file, row_file = map(Path, sys.argv[1:] if arguments is None else arguments)
    case = Case.from_json(json.loads(case_file.read_bytes()))
    # only a whole row appears under its name
    partial = row_file.with_suffix(".partial")
    partial.write_text(json.dumps(measure_case(case), allow_nan=False))
    partial.replace(row_file)


def measure_case(case: Case) -> dict[str, Any]:
    """Quantize and measure."""
    measured = _measure_ours(case) if case.method in RECIPES else _measure_peer(case)
    return {**case.identity, **measured}


def _measure_ours(case: Case) -> dict[str, Any]:
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        job = QuantJob(
            source_dir=case.model,
            out_dir=Path(folder) / "out",
            state_dir=Path(folder) / "state",
            spec=case.spec,
            repo=case.model.name,
            calibration_text=case.text,
            evaluation=EvaluationPlan(
                windows=case.eval_windows,
                length=case.eval_length,
                texts=(
                    EvaluationText(path=case.eval_text),
                    EvaluationText(path=case.second_text),
                ),
            ),
            device=case.device,
        )
        report = quantize_model(job, Watch(on_event=clock))
    row: dict[str, Any] = {}
    for name, text in zip(("wikitext2", "second"), report.evaluation.texts, strict=True):
        assert text.perplexity is not None, f"{name}: {text.message}"
        assert text.divergence is not None, "a plan without a word about it compares"
        row |= _columns(name, text.perplexity.fp, text.perplexity.quant, text.divergence)
    return row | {
        "bits_per_weight": round(report.bits_per_weight, 4),
        "seconds": round(clock.quantized_s, 1),
    }


def _measure_peer(case: Case) -> dict[str, Any]:
    source = SourceModel.open(case.model)
    linears, spec = source.architecture.linears, case.spec
    text = read_text(case.text, BuiltinText.CALIBRATION)
    ids = tokenize(load_tokenizer(case.model), text)
    job = PeerJob(
        model_dir=case.model,
        tokens=sample_windows(text, ids, case.samples, case.length, case.seed).tokens,
        grid=grid_of(spec, linears),
        a_bits=spec.a_bits,
        seed=case.seed,
        steps=case.peer_steps,
        device=case.device,
    )
    torch.manual_seed(case.seed)
    started_s = time.monotonic()
    try:
        weights = PEERS[case.method].quantize(job)
    except ImportError as error:
        raise ImportError(f"{MISSING} ({error})") from error
    seconds = time.monotonic() - started_s
    check_levels(weights, job.grid, linears)
    result = OverlaidModel(source=source, weights=weights, a_bits=spec.a_bits)
    return {
        **_compare(case, source, result, "wikitext2", case.eval_text),
        **_compare(case, source, result, "second", case.second_text),
        "bits_per_weight": round(stored_bits(job.grid, linears), 4),
        "seconds": round(seconds, 1),
    }


def _compare(
    case: Case, source: SourceModel, result: OverlaidModel, name: str, path: Path | None
) -> dict[str, Any]:
    text = read_text(path, BuiltinText.EVALUATION)
    ids = tokenize(load_tokenizer(case.model), text)
    tokens = consecutive_windows(text, ids, case.eval_windows, case.eval_length).tokens
    compared = compare_chains(
        Chain.start(source, tokens, device=case.device),
        Chain.start(result, tokens, kv_bits=case.spec.kv_bits, device=case.device),
        tokens,
        SILENT,
    )
    return _columns(name, compared.fp.value, compared.quant.value, compared.divergence)


def _columns(name: str, fp: float, quant: float, divergence: Divergence) -> dict[str, float]:
    return {
        f"ppl_{name}": round(quant, 4),
        f"ppl_fp_{name}": round(fp, 4),
        f"kl_{name}": round(divergence.mean, 6),
        f"top1_{name}": round(divergence.top1_agreement, 5),
    }


class _Clock:
    """Stops when quantizing ends and measuring begins; says when every stage and layer ended."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self.quantized_s = 0.0

    def __call__(self, event: Event, /) -> None:
        if not isinstance(event, StageStarted | LayerFinished | EvaluationResult):
            return
        elapsed_s = time.monotonic() - self._started_s
        # the log of a row that was killed says how far it came
        print(f"{elapsed_s:8.2f} s  {event}", flush=True)
        if isinstance(event, StageStarted) and event.stage is Stage.EVALUATING:
            self.quantized_s = elapsed_s


if __name__ == "__main__":
    main()
