"""Writing a checkpoint directory: tensor by tensor, durable, and visible only when complete."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.architecture import Architecture, check_config
from engine.checkpoint.bits import BitTally, StoredBits
from engine.checkpoint.destination import check_destination, partial_of, publish
from engine.checkpoint.durable import save_tensors
from engine.checkpoint.evaluation import Evaluation
from engine.checkpoint.format import (
    CONFIG_NAME,
    INDEX_NAME,
    PACKED_SUFFIX,
    TOKENIZER_FILES,
    quantization_section,
    rotation_section,
    shard_name,
)
from engine.checkpoint.manifest import (
    FileRecord,
    LayerRecord,
    Manifest,
    TuningRecord,
    hash_file,
    write_manifest,
)
from engine.checkpoint.search_record import SearchRecord
from engine.rotation import Rotation
from engine.spec import QuantSpec

__all__ = ["CheckpointSummary", "Provenance", "write_checkpoint"]

MAX_SHARD_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a checkpoint comes from and how its layers fared."""

    source_dir: Path
    """Where tokenizer files are copied from."""
    engine_version: str
    repo: str
    revision: str
    layers: Sequence[LayerRecord]
    evaluation: Evaluation = field(default_factory=Evaluation)
    rotation: Rotation = field(default_factory=Rotation.none)
    """How the tensors of the layers were rotated."""
    search: SearchRecord | None = None
    tuning: TuningRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """What was written."""

    manifest_sha256: str
    bits: StoredBits
    files: tuple[FileRecord, ...]
    """Every file but the manifest, sorted by path."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(each.bytes for each in self.files)


def write_checkpoint(
    out_dir: Path,
    *,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    spec: QuantSpec,
    provenance: Provenance,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> CheckpointSummary:
    """Write a directory beside its final place, then rename it there.

    Args:
        out_dir: an earlier result is replaced, a partial one of an earlier attempt removed.
        config: the source's `config.json`; the `quantization_config` is added here.
        tensors: name and tensor, consumed once; at most one shard is in memory.
        spec: what was done.
        provenance: tokenizer files, and what the manifest says beside measurements.
        max_shard_bytes: a shard is closed before it would pass this.

    Raises:
        SpecError: if `out_dir` holds something that is no checkpoint.
        OSError: with its number, as when the disk is full.
    """
    check_destination(out_dir)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    tally = BitTally(architecture=check_config(plain), spec=spec)
    partial = partial_of(out_dir)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    file_of = _write_shards(partial, tensors, tally, max_shard_bytes)
    section = _section(tally.architecture, spec, file_of, provenance.rotation)
    # the code that an `auto_map` names is not part of the result
    kept = {name: value for name, value in plain.items() if name != "auto_map"}
    _write_json(partial / CONFIG_NAME, {**kept, "quantization_config": section})
    for name in TOKENIZER_FILES:
        if (provenance.source_dir / name).is_file():
            shutil.copyfile(provenance.source_dir / name, partial / name)
    files = tuple(hash_file(path) for path in sorted(partial.iterdir()))
    bits = tally.total()
    digest = write_manifest(partial, _manifest(spec, provenance, bits, files))
    publish(out_dir)
    return CheckpointSummary(manifest_sha256=digest, bits=bits, files=files)


def _write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    tally: BitTally,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write shards and their index; return the file of every tensor."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total_bytes = pending_bytes = 0

    def close_shard() -> None:
        # the number of shards is known at the end, so they are named then
        save_tensors(pending, directory / f"{len(shards)}.shard", {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            close_shard()
            pending_bytes = 0
        tally.add(name, tensor)
        # a view would drag its whole storage along
        pending[name] = tensor.detach().to("cpu").contiguous().clone()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if pending:
        close_shard()
    file_of: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = shard_name(index, len(shards))
        (directory / f"{index}.shard").rename(directory / file)
        file_of |= dict.fromkeys(names, file)
    index_record = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
    _write_json(directory / INDEX_NAME, index_record)
    return file_of


def _manifest(
    spec: QuantSpec, provenance: Provenance, bits: StoredBits, files: tuple[FileRecord, ...]
) -> Manifest:
    search = provenance.search
    return Manifest(
        engine_version=provenance.engine_version,
        source={"repo": provenance.repo, "revision": provenance.revision},
        spec=spec,
        seed=spec.calibration.seed,
        bits=bits,
        layers=tuple(provenance.layers),
        evaluation=provenance.evaluation,
        files=files,
        search=None if search is None else search.achieving(bits.per_weight),
        tuning=provenance.tuning,
    )


def _section(
    architecture: Architecture, spec: QuantSpec, names: Iterable[str], rotation: Rotation
) -> dict[str, Any]:
    converted = {name.removesuffix(PACKED_SUFFIX) for name in names if name.endswith(PACKED_SUFFIX)}
    kept = [each.name for each in architecture.linears if each.name not in converted]
    section = quantization_section(spec, [*kept, architecture.family.head])
    if not rotation.is_none:
        section["rotation"] = rotation_section(architecture, rotation)
    return section


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
