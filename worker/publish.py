"""A finished checkpoint directory into the object store, and from there to the Hub."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.db.tables.jobs import Job
from api.errors import InvalidRequest
from api.hub.base import ModelHub, PublishedModel, PublishTarget
from api.hub.card import write_card
from api.storage.base import ObjectStore
from engine.errors import CheckpointInvalid

__all__ = ["MANIFEST_FILE", "StoredArtifact", "StoredFile", "publish_to_hub", "store_artifact"]

MANIFEST_FILE = "abq_manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file of a stored artifact."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArtifact:
    """What the store holds now."""

    manifest_sha256: str
    """The artifact's digest."""
    bits_per_weight: float
    """Counted from the stored tensors."""
    summary: dict[str, Any]
    """The manifest without its list of files."""
    files: tuple[StoredFile, ...]
    """Every file, the manifest included."""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(each.bytes for each in self.files)


def store_artifact(store: ObjectStore, artifact_id: str, folder: Path) -> StoredArtifact:
    """Check a checkpoint directory against its manifest and keep it under `artifact_id`.

    The manifest goes last: a key with a manifest is a complete artifact.

    Raises:
        CheckpointInvalid: a file is missing, is not listed, or differs from its hash.
    """
    manifest = _read_manifest(folder)
    listed = [StoredFile(**each) for each in manifest["files"]]
    _check_names(folder, listed)
    for file in listed:
        if _measure(folder / file.path, file.path) != file:
            raise CheckpointInvalid(f"{file.path} differs from what {MANIFEST_FILE} says")
        store.put_file(f"{artifact_id}/{file.path}", folder / file.path)
    itself = _measure(folder / MANIFEST_FILE, MANIFEST_FILE)
    store.put_file(f"{artifact_id}/{MANIFEST_FILE}", folder / MANIFEST_FILE)
    return StoredArtifact(
        manifest_sha256=itself.sha256,
        bits_per_weight=float(manifest["bits"]["per_weight"]),
        summary={name: value for name, value in manifest.items() if name != "files"},
        files=(*listed, itself),
    )


def publish_to_hub(
    hub: ModelHub, job: Job, folder: Path, check: Callable[[], None]
) -> PublishedModel | None:
    """Push a checkpoint directory where the job asks for it; None where it does not ask.

    The push is one commit, tagged with the job's id, and is made once however often this runs.
    An exception from `check`, which is asked while bytes go out, ends it with nothing visible.

    Raises:
        ServiceError: the Hub refused, did not answer, or the source is gated by now.
    """
    if job.publish is None:
        return None
    target = PublishTarget.from_json(job.publish)
    # licence and gate as they are today: the job may have waited for a day
    resolved = hub.resolve(job.model, job.source_sha)
    if resolved.gated and not target.private:
        raise InvalidRequest(
            "The source is gated, so its quantization is not pushed publicly.",
            param="publish.private",
        )
    card = write_card(
        resolved=resolved, manifest=_read_manifest(folder), repo_id=target.repo_id, tag=job.id
    )
    return hub.publish(folder, target, card=card, tag=job.id, check=check)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"{MANIFEST_FILE} is missing or no JSON") from error
    return manifest


def _check_names(folder: Path, listed: list[StoredFile]) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {each.path for each in listed} | {MANIFEST_FILE}
    if found != expected:
        odd = ", ".join(sorted(found ^ expected))
        raise CheckpointInvalid(f"the files and {MANIFEST_FILE} differ about {odd}")


def _measure(path: Path, name: str) -> StoredFile:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return StoredFile(path=name, bytes=path.stat().st_size, sha256=digest)
