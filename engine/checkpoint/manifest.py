"""What is in a checkpoint directory: every file with its hash, the bits, the spec, the origin.

The manifest holds nothing that differs between two equal runs (no times, no host names), so its
own sha256 is the digest of the artifact.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from engine.checkpoint.bits import StoredBits
from engine.checkpoint.durable import write_atomically
from engine.checkpoint.evaluation import Evaluation
from engine.checkpoint.format import MANIFEST_NAME
from engine.checkpoint.search_record import SearchRecord
from engine.errors import CheckpointInvalid, SpecError
from engine.spec import QuantSpec

__all__ = [
    "FileRecord",
    "LayerRecord",
    "Manifest",
    "TuningRecord",
    "digest_of",
    "hash_file",
    "read_manifest",
    "record_evaluation",
    "verify_directory",
    "write_manifest",
]

MANIFEST_FORMAT = "abq-manifest-v1"
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """How one layer was quantized; the losses are those of its decoder layer."""

    name: str
    w_bits: int
    a_bits: int
    group_size: int
    loss_before: float
    loss_after: float
    fell_back: bool = False
    """Learning diverged; the decoder layer is rounded to nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRecord:
    """What the last stage of a calibration gained, in nats a token from the source's logits."""

    divergence_before: float
    divergence_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of the directory."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader can check and a person may ask."""

    engine_version: str
    source: Mapping[str, str]
    """`repo` and `revision`."""
    spec: QuantSpec
    seed: int
    bits: StoredBits
    layers: tuple[LayerRecord, ...]
    evaluation: Evaluation
    files: tuple[FileRecord, ...]
    """Every file but the manifest, sorted by path."""
    search: SearchRecord | None = None
    """Why the layers have their bits, where a search chose them."""
    tuning: TuningRecord | None = None
    """Over the calibration windows, where the whole model was tuned at the end."""

    def to_json(self) -> dict[str, Any]:
        """Write every field; `search` and `tuning` where there was one."""
        found = {} if self.search is None else {"search": self.search.to_json()}
        tuned = {} if self.tuning is None else {"tuning": asdict(self.tuning)}
        return {
            **found,
            **tuned,
            "format": MANIFEST_FORMAT,
            "engine_version": self.engine_version,
            "source": dict(self.source),
            "spec": self.spec.to_json(),
            "seed": self.seed,
            "bits": asdict(self.bits),
            "layers": [asdict(each) for each in self.layers],
            "evaluation": self.evaluation.to_json(),
            "files": [asdict(each) for each in self.files],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            CheckpointInvalid: if a field is missing or not what it should be.
        """
        if record.get("format") != MANIFEST_FORMAT:
            raise CheckpointInvalid(f"{MANIFEST_NAME} is not of the format {MANIFEST_FORMAT}")
        try:
            search, tuning = record.get("search"), record.get("tuning")
            return cls(
                engine_version=str(record["engine_version"]),
                source={str(key): str(value) for key, value in record["source"].items()},
                spec=QuantSpec.from_json(record["spec"]),
                seed=int(record["seed"]),
                bits=StoredBits(**record["bits"]),
                layers=tuple(LayerRecord(**each) for each in record["layers"]),
                evaluation=Evaluation.from_json(record["evaluation"]),
                files=tuple(FileRecord(**each) for each in record["files"]),
                search=None if search is None else SearchRecord.from_json(search),
                tuning=None if tuning is None else TuningRecord(**tuning),
            )
        except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
            raise CheckpointInvalid(f"{MANIFEST_NAME} is damaged: {error}") from error


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Write the manifest, replacing an old one in one step; return its sha256."""
    text = json.dumps(manifest.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(directory / MANIFEST_NAME, text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a directory.

    Raises:
        CheckpointInvalid: if it is missing, too large, or damaged.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointInvalid(f"{MANIFEST_NAME} is missing")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointInvalid(f"{MANIFEST_NAME} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{MANIFEST_NAME} is no valid JSON") from error
    if not isinstance(record, dict):
        raise CheckpointInvalid(f"{MANIFEST_NAME} is no JSON object")
    return Manifest.from_json(record)


def verify_directory(
    directory: Path, on_fraction: Callable[[float], None] = lambda _: None
) -> Manifest:
    """Check every file against the manifest.

    Args:
        directory: the checkpoint.
        on_fraction: told how much of all bytes was read, 0 to 1.

    Raises:
        CheckpointInvalid: naming the first file that is missing or differs.
    """
    manifest = read_manifest(directory)
    total, done = sum(record.bytes for record in manifest.files) or 1, 0
    for record in manifest.files:
        # a manifest is a stranger's file: it must not point outside its directory
        if Path(record.path).name != record.path:
            raise CheckpointInvalid(f"{MANIFEST_NAME} names {record.path!r}, which is no file name")
        path = directory / record.path
        if not path.is_file():
            raise CheckpointInvalid(f"{record.path} is missing")
        if path.stat().st_size != record.bytes:
            raise CheckpointInvalid(
                f"{record.path} has {path.stat().st_size} bytes instead of {record.bytes}"
            )
        if hash_file(path).sha256 != record.sha256:
            raise CheckpointInvalid(f"{record.path} differs from its sha256")
        done += record.bytes
        on_fraction(done / total)
    return manifest


def record_evaluation(directory: Path, evaluation: Evaluation) -> str:
    """Add what was measured to a finished directory; return the manifest's new sha256."""
    return write_manifest(directory, replace(read_manifest(directory), evaluation=evaluation))


def digest_of(directory: Path) -> str:
    """The artifact's digest: sha256 of its manifest."""
    return hash_file(directory / MANIFEST_NAME).sha256


def hash_file(path: Path) -> FileRecord:
    """Measure one file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return FileRecord(path=path.name, bytes=path.stat().st_size, sha256=digest.hexdigest())
