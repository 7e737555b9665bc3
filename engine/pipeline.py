"""A quantization from source directory to checkpoint directory: search, calibrate, pack, evaluate.

Deterministic: the same job on the same machine writes the same bytes, also when it was cut off
and taken up again.
"""

import time
from dataclasses import replace

import torch

from engine.calibration.block import BlockShape
from engine.calibration.block_loop import BlockLoop, BlockLosses
from engine.calibration.dataset import (
    BuiltinText,
    TokenWindows,
    load_tokenizer,
    read_text,
    sample_windows,
    tokenize,
)
from engine.calibration.finish import finish
from engine.calibration.merge import merged_tensors
from engine.calibration.resume import ENGINE_VERSION, BlockStore, Tuning, fingerprint
from engine.calibration.watch import Watch
from engine.checkpoint.destination import check_destination
from engine.checkpoint.manifest import LayerRecord, digest_of, hash_file
from engine.checkpoint.search_record import SearchRecord
from engine.checkpoint.writer import CheckpointSummary, Provenance, write_checkpoint
from engine.evaluation.comparison import evaluate
from engine.evaluation.plan import EvaluationPlan
from engine.events import ArtifactFile, Stage, StageStarted
from engine.fit import check_spec
from engine.job import QuantJob, best_device
from engine.models.loading import SourceModel, read_config
from engine.models.rotated import rotated
from engine.models.source_check import check_finite
from engine.report import QuantReport
from engine.rotation import Rotation, online_blocks
from engine.search.search import FoundBits
from engine.search.stage import find_bits
from engine.spec import QuantSpec

__all__ = ["EvaluationPlan", "QuantJob", "QuantReport", "best_device", "quantize_model"]


def quantize_model(job: QuantJob, watch: Watch) -> QuantReport:
    """Quantize a model directory into a checkpoint directory.

    Raises:
        UnsupportedModel: naming the field of the config.
        SpecError: if spec or evaluation do not fit the model, or `job.out_dir` must stay.
        DatasetUnavailable: if a text is missing, too short, or has tokens that the model lacks.
        CalibrationDiverged: naming the layer; finished blocks stay in `job.state_dir`.
        CalibrationInterrupted: if the watch says to stop; finished blocks stay as well.
    """
    started_s = time.monotonic()
    source = _open_source(job, watch)
    first = Stage.CALIBRATING if job.spec.target is None else Stage.SEARCHING
    watch.report(StageStarted(stage=first))
    windows = _calibration_windows(job, source.architecture.vocab)
    found = _find_bits(job, source, windows.tokens, watch)
    job = replace(job, spec=found.spec)
    if found.record is not None:
        watch.report(StageStarted(stage=Stage.CALIBRATING))
    store = _open_store(job, source, windows, watch)
    loop = _block_loop(job, source, store, watch)
    calibrated = loop.run(windows.tokens)
    tuning = finish(loop, calibrated, windows.tokens)
    watch.report(StageStarted(stage=Stage.PACKING))
    provenance = _provenance(job, source, calibrated.losses, tuning, found.record)
    summary = _pack(job, source, store, provenance)
    evaluation = evaluate(source, job.out_dir, job.evaluation, watch, job.device)
    _tell_files(job, watch)
    bits = summary.bits
    return QuantReport(
        bits_per_weight=bits.per_weight,
        promised_bits_per_weight=bits.promised_per_weight,
        bytes_fp=bits.fp_bytes,
        bytes_quant=bits.packed_bytes + bits.other_bytes + bits.embedding_bytes,
        evaluation=evaluation,
        seconds=round(time.monotonic() - started_s, 3),
        layers=source.architecture.layers,
        manifest_sha256=digest_of(job.out_dir),
        search=found.record,
    )


def _open_source(job: QuantJob, watch: Watch) -> SourceModel:
    """Open the model, and refuse before any work what could not end well."""
    check_destination(job.out_dir, apart_from=(job.source_dir, job.state_dir))
    source = SourceModel.open(job.source_dir)
    check_spec(source.architecture, job.spec)
    job.evaluation.check_positions(source.architecture.max_positions)
    check_finite(source, watch.check)
    return source


def _block_loop(job: QuantJob, source: SourceModel, store: BlockStore, watch: Watch) -> BlockLoop:
    rotation, device = Rotation.of(job.spec, source.architecture), torch.device(job.device)
    return BlockLoop(
        model=rotated(replace(source, block_device=device), rotation),
        spec=job.spec,
        store=store,
        watch=watch,
        device=device,
        shape=BlockShape.of(source.architecture, online_blocks(source.architecture, rotation)),
        memory=job.chain_memory,
    )


def _calibration_windows(job: QuantJob, vocab: int) -> TokenWindows:
    text = read_text(job.calibration_text, BuiltinText.CALIBRATION)
    ids = tokenize(load_tokenizer(job.source_dir), text)
    wanted = job.spec.calibration
    windows = sample_windows(text, ids, wanted.samples, wanted.length, wanted.seed)
    windows.check_vocabulary(vocab)
    return windows


def _tell_files(job: QuantJob, watch: Watch) -> None:
    for path in sorted(job.out_dir.iterdir()):
        file = hash_file(path)
        watch.report(ArtifactFile(path=file.path, bytes=file.bytes, sha256=file.sha256))


def _find_bits(job: QuantJob, source: SourceModel, tokens: torch.Tensor, watch: Watch) -> FoundBits:
    return find_bits(
        source,
        job.spec,
        tokens,
        state_dir=job.state_dir,
        device=torch.device(job.device),
        watch=watch,
    )


def _open_store(
    job: QuantJob, source: SourceModel, windows: TokenWindows, watch: Watch
) -> BlockStore:
    mark = fingerprint(
        read_config(job.source_dir),
        source.tensors,
        windows.tokens,
        job.spec,
        torch.device(job.device),
    )
    store = BlockStore.open(job.state_dir, mark)
    watch.say(
        f"calibrating with {len(windows.tokens)} windows of {windows.tokens.shape[1]} tokens"
        f" of {windows.text_name} (sha256 {windows.text_sha256})"
    )
    if store.was_stale:
        watch.say("the checkpoint on disk belongs to another calibration; starting afresh")
    return store


def _provenance(
    job: QuantJob,
    source: SourceModel,
    losses: list[BlockLosses],
    tuning: Tuning | None,
    search: SearchRecord | None,
) -> Provenance:
    return Provenance(
        source_dir=job.source_dir,
        engine_version=ENGINE_VERSION,
        repo=job.repo,
        revision=job.revision,
        layers=_layer_records(job.spec, source, losses),
        rotation=Rotation.of(job.spec, source.architecture),
        search=search,
        tuning=None if tuning is None else tuning.record,
    )


def _pack(
    job: QuantJob, source: SourceModel, store: BlockStore, provenance: Provenance
) -> CheckpointSummary:
    model = rotated(source, provenance.rotation)
    return write_checkpoint(
        job.out_dir,
        config=read_config(job.source_dir),
        tensors=merged_tensors(source, store, model),
        spec=job.spec,
        provenance=provenance,
    )


def _layer_records(
    spec: QuantSpec, source: SourceModel, losses: list[BlockLosses]
) -> list[LayerRecord]:
    per_block = len(source.architecture.linears_per_layer)
    records = []
    for position, linear in enumerate(source.architecture.linears):
        grid = spec.weight_grid(linear.name)
        if grid is not None:
            fared = losses[position // per_block]
            records.append(
                LayerRecord(
                    name=linear.name,
                    w_bits=grid.bits,
                    a_bits=spec.activation_bits(linear.name),
                    group_size=grid.group_size,
                    loss_before=fared.before,
                    loss_after=fared.after,
                    fell_back=fared.fell_back,
                )
            )
    return records
