"""Results to look at and to download: the manifest, and each file by range."""

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from api.db.connection import Database
from api.db.repositories import artifacts, jobs
from api.db.tables.artifacts import Artifact, ArtifactFile
from api.errors import RangeNotSatisfiable
from api.storage.base import ObjectStore

__all__ = ["ArtifactContents", "ByteRange", "Download", "get_artifact_of_job", "open_download"]

BLOCK_BYTES = 1 << 20
SINGLE_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactContents:
    """An artifact and its files, by path."""

    artifact: Artifact
    files: Sequence[ArtifactFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """The bytes from `start` up to and without `end`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """What to send of a file: all of it, a range, or nothing because the client has it."""

    file: ArtifactFile
    path: Path
    range: ByteRange | None
    """None is the whole file."""
    is_unchanged: bool

    @property
    def status(self) -> int:
        """The HTTP status that says which it is."""
        if self.is_unchanged:
            return 304
        return 200 if self.range is None else 206

    @property
    def headers(self) -> dict[str, str]:
        """Everything a client needs to check, resume and keep the file."""
        headers = {
            "ETag": _etag(self.file),
            # an artifact never changes: its id stands for these bytes
            "Cache-Control": "private, max-age=31536000, immutable",
            "Accept-Ranges": "bytes",
        }
        if self.is_unchanged:
            return headers
        digest = b64encode(bytes.fromhex(self.file.sha256)).decode()
        name = quote(self.file.path.rsplit("/", 1)[-1])
        headers["Repr-Digest"] = f"sha-256=:{digest}:"
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"
        headers["Content-Length"] = str(self.file.bytes)
        if self.range is not None:
            start, end = self.range.start, self.range.end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{self.file.bytes}"
            headers["Content-Length"] = str(end - start)
        return headers

    def read(self) -> Iterator[bytes]:
        """Read the bytes to send."""
        wanted = self.range or ByteRange(start=0, end=self.file.bytes)
        left = wanted.end - wanted.start
        with self.path.open("rb") as stream:
            stream.seek(wanted.start)
            while left and (block := stream.read(min(BLOCK_BYTES, left))):
                left -= len(block)
                yield block


def get_artifact_of_job(database: Database, tenant_id: str, job_id: str) -> ArtifactContents:
    """Read what a job made.

    Raises:
        JobNotFound: there is no such job, or it is another tenant's.
        ArtifactNotFound: the job has made nothing yet.
    """
    with database.read() as session:
        jobs.get_job(session, tenant_id, job_id)
        artifact = artifacts.artifact_of_job(session, tenant_id, job_id)
        return ArtifactContents(artifact=artifact, files=artifacts.list_files(session, artifact.id))


def open_download(
    database: Database,
    store: ObjectStore,
    tenant_id: str,
    key: tuple[str, str],
    conditions: Mapping[str, str],
) -> Download:
    """Find a file and decide what to send of it.

    Args:
        database: where artifacts are listed; a path that is not in it leads nowhere.
        store: where the bytes are.
        tenant_id: the owner.
        key: id of the artifact and path of the file.
        conditions: request headers by lower-case name: range, if-range, if-none-match.

    Raises:
        ArtifactNotFound: there is none, or it is another tenant's.
        FileNotInArtifact: the artifact has no file of this path.
        RangeNotSatisfiable: the file has no such bytes.
    """
    artifact_id, path = key
    with database.read() as session:
        artifact = artifacts.get_artifact(session, tenant_id, artifact_id)
        file = artifacts.get_file(session, artifact.id, path)
    is_unchanged = _matches(conditions.get("if-none-match", ""), _etag(file))
    return Download(
        file=file,
        path=store.path_of(f"{artifact.id}/{file.path}"),
        is_unchanged=is_unchanged,
        # a client that has the file is not told that its range is wrong
        range=None if is_unchanged else _wanted_range(file, conditions),
    )


def _etag(file: ArtifactFile) -> str:
    return f'"sha256-{file.sha256}"'


def _matches(header: str, etag: str) -> bool:
    # weak comparison, as If-None-Match asks for
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def _wanted_range(file: ArtifactFile, conditions: Mapping[str, str]) -> ByteRange | None:
    """Read a single range; several ranges and malformed ones are answered with the whole file."""
    match = SINGLE_RANGE.fullmatch(conditions.get("range", "").strip())
    if_range = conditions.get("if-range")
    # a date never matches: the strong tag is the only validator that is given out
    if match is None or (if_range is not None and if_range.strip() != _etag(file)):
        return None
    first, last = match[1], match[2]
    if not first and not last:
        return None
    size = file.bytes
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if first and last and int(last) < start:
        return None
    if start >= end:
        raise RangeNotSatisfiable(
            f"{file.path} has {size} bytes.", headers={"Content-Range": f"bytes */{size}"}
        )
    return ByteRange(start=start, end=end)
