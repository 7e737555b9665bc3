"""Finished blocks on disk: one safetensors file and one small record for each.

A block counts only with its record, which is written last and holds the hash of the tensors, so
a process that dies at any moment leaves either a whole block or none. Blocks of another model,
text, spec, engine or kind of device are never mixed in: the fingerprint tells them apart.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.checkpoint.durable import save_tensors, sync_path, write_atomically
from engine.checkpoint.manifest import TuningRecord, hash_file
from engine.models.tensors import TensorFiles
from engine.spec import QuantSpec

__all__ = ["ENGINE_VERSION", "BlockStore", "SavedBlock", "Tuning", "fingerprint"]

ENGINE_VERSION = "0.3.1"
"""Raised with every change that alters what a calibration writes."""
TUNED = 99_999
"""The number under which the last stage is kept, behind every block."""
FINGERPRINT_NAME = "fingerprint.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBlock:
    """What is kept of a finished block."""

    tensors: dict[str, torch.Tensor]
    """Packed codes, scales, zero-points, and norms and biases that changed, by their names inside
    the block."""
    loss_before: float
    loss_after: float
    fell_back: bool = False
    """Learning diverged; the block is rounded to nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What the last stage found."""

    tensors: dict[str, torch.Tensor]
    """By full name: what replaces the blocks' tensors; empty where nothing was gained."""
    before: float
    """Mean divergence from the full-precision logits, in nats a token."""
    after: float

    @property
    def record(self) -> TuningRecord:
        """What the manifest says of it."""
        return TuningRecord(divergence_before=self.before, divergence_after=self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStore:
    """The finished blocks of one calibration."""

    directory: Path
    mark: str
    was_stale: bool
    """True when blocks of another calibration were found and removed."""

    @classmethod
    def open(cls, directory: Path, mark: str) -> Self:
        """Make the directory, and empty it where it belongs to another fingerprint."""
        directory.mkdir(parents=True, exist_ok=True)
        found = _read_json(directory / FINGERPRINT_NAME)
        leftovers = [
            path for path in directory.iterdir() if path.name.lstrip(".").startswith("block-")
        ]
        fits = found is not None and found.get("fingerprint") == mark
        if not fits:
            for path in leftovers:
                path.unlink()
            write_atomically(directory / FINGERPRINT_NAME, _as_bytes({"fingerprint": mark}))
        return cls(directory=directory, mark=mark, was_stale=bool(leftovers) and not fits)

    def save(self, index: int, block: SavedBlock) -> None:
        """Make a block durable.

        Raises:
            OSError: with its number, as when the disk is full.
        """
        path = self._tensor_path(index)
        partial = path.with_suffix(".partial")
        save_tensors(
            {name: each.cpu().contiguous() for name, each in block.tensors.items()}, partial
        )
        digest = hash_file(partial).sha256
        sync_path(partial)
        partial.replace(path)
        record = {
            "sha256": digest,
            "loss_before": block.loss_before,
            "loss_after": block.loss_after,
            "fell_back": block.fell_back,
        }
        write_atomically(self._record_path(index), _as_bytes(record))

    def load(self, index: int) -> SavedBlock | None:
        """Read a block; None where it is missing, torn or damaged."""
        record = _read_json(self._record_path(index))
        path = self._tensor_path(index)
        if record is None or not path.is_file() or hash_file(path).sha256 != record.get("sha256"):
            return None
        try:
            return SavedBlock(
                tensors=load_file(path),
                loss_before=float(record["loss_before"]),
                loss_after=float(record["loss_after"]),
                fell_back=bool(record["fell_back"]),
            )
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save_tuned(self, tuning: Tuning) -> None:
        """Make what the last stage changed durable."""
        kept = SavedBlock(
            tensors=tuning.tensors, loss_before=tuning.before, loss_after=tuning.after
        )
        self.save(TUNED, kept)

    def load_tuned(self) -> Tuning | None:
        """Read what the last stage changed; None where it has not run, or measured nothing."""
        saved = self.load(TUNED)
        # version 0.3.1 could store a divergence that is not finite
        if saved is None or not math.isfinite(saved.loss_before):
            return None
        return Tuning(tensors=saved.tensors, before=saved.loss_before, after=saved.loss_after)

    def _tensor_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"

    def _record_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.json"


def fingerprint(
    config: Mapping[str, Any],
    files: TensorFiles,
    tokens: torch.Tensor,
    spec: QuantSpec,
    device: torch.device,
) -> str:
    """Identify a calibration by all that its result depends on.

    Args:
        config: the model's `config.json`.
        files: the model's weights; every byte is hashed.
        tokens: int64 ``[W, T]``, the calibration windows.
        spec: what is asked for.
        device: its kind counts: sums differ in the last bit between CPU and GPU.
    """
    parts = {
        "engine_version": ENGINE_VERSION,
        "torch_version": torch.__version__,
        "device": device.type,
        "config": config,
        "weights": {path.name: hash_file(path).sha256 for path in files.files},
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "spec": asdict(spec),
    }
    return hashlib.sha256(_as_bytes(parts)).hexdigest()


def _as_bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
