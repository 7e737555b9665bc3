"""Whether a checkpoint folder is what its manifest says, and how many bits its weights take.

Everything is counted from the files themselves; a safetensors file names its tensors in a JSON
header whose length stands in its first eight bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.cli.errors import CliError
from api.cli.transfer import sha256_of

__all__ = ["MANIFEST_FILE", "StoredBits", "count_stored_bits", "verify_folder"]

MANIFEST_FILE = "abq_manifest.json"
PACKED_PARTS = (".weight_packed", ".weight_scale", ".weight_zero_point")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBits:
    """What the quantized linear layers of a checkpoint take on disk."""

    weights: int
    bits: int

    @property
    def per_weight(self) -> float:
        """Bits per weight: codes, scales and zero-points."""
        return self.bits / self.weights


def verify_folder(folder: Path, manifest_sha256: str) -> dict[str, Any]:
    """Check the manifest against its digest and every file against the manifest.

    Returns:
        The manifest.

    Raises:
        CliError: naming the first file that differs.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise CliError(f"{path} is missing")
    if sha256_of(path) != manifest_sha256:
        raise CliError(f"{path} is not the manifest of this artifact")
    manifest: dict[str, Any] = json.loads(path.read_bytes())
    for file in manifest["files"]:
        found = folder / file["path"]
        if not found.is_file() or found.stat().st_size != file["bytes"]:
            raise CliError(f"{found} is missing or has another size than the manifest says")
        if sha256_of(found) != file["sha256"]:
            raise CliError(f"{found} has another sha256 than the manifest says")
    return manifest


def count_stored_bits(folder: Path, weights: int) -> StoredBits:
    """Add up the stored bytes of all packed layers; `weights` is how many weights they hold."""
    sizes = {name: size for path in folder.glob("*.safetensors") for name, size in _tensors(path)}
    packed = sum(size for name, size in sizes.items() if name.endswith(PACKED_PARTS))
    if not weights or not packed:
        raise CliError(f"{folder} holds no quantized weights")
    return StoredBits(weights=weights, bits=packed * 8)


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and stored bytes of each tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, end - start
