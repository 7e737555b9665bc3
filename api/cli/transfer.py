"""Fetching the files of an artifact: in parallel, resumed where a former try stopped, verified.

A file grows under `.<name>.<first characters of its sha256>.part` beside its place, so that what
is resumed always belongs to the same content, and gets its name once its hash is right.
"""

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import file_digest
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from api.cli.client import ApiClient
from api.cli.errors import CliError, ServiceUnreachable

__all__ = ["fetch_files", "sha256_of"]

LOCK_FILE = ".abq-download.lock"
TRIES = 5
"""Cut connections that a file survives without a byte in between."""
PAUSE_S = 0.5
"""Times the number of cuts so far."""

OnBytes = Callable[[int], None]


def fetch_files(
    client: ApiClient,
    files: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    workers: int,
    on_bytes: OnBytes,
) -> None:
    """Bring every file (`path`, `bytes`, `sha256`, `url`) into a folder.

    Files that are already there and right are kept. `on_bytes` hears every byte that is in
    place, fetched or found, and a negative number for bytes that turned out wrong. A second
    download into the same folder waits for the first.

    Raises:
        CliError: if a path leaves the folder or a hash stays wrong.
        ApiProblem: if the service refuses.
    """
    targets = [_target(folder, str(file["path"])) for file in files]
    with _alone_in(folder), ThreadPoolExecutor(workers) as pool:
        pending = [
            pool.submit(_fetch_file, client, file, target, on_bytes)
            for file, target in zip(files, targets, strict=True)
        ]
        try:
            for each in pending:
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sha256_of(path: Path) -> str:
    """Hash a file, hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _target(folder: Path, path: str) -> Path:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path:
        raise CliError(f"the service names a file outside the folder: {path}")
    return folder.joinpath(*parts)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_file(
    client: ApiClient, file: Mapping[str, Any], target: Path, on_bytes: OnBytes
) -> None:
    if _is_complete(target, file):
        on_bytes(file["bytes"])
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{file['sha256'][:16]}.part")
    # a wrong hash behind a resumed part is fetched once more from its first byte
    for _ in range(2):
        _fill_part(client, file, part, on_bytes)
        if _is_complete(part, file):
            part.replace(target)
            return
        on_bytes(-part.stat().st_size)
        part.unlink()
    raise CliError(f"{file['path']} arrives with another sha256 than its manifest says")


def _is_complete(path: Path, file: Mapping[str, Any]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == file["bytes"]
        and sha256_of(path) == file["sha256"]
    )


def _fill_part(client: ApiClient, file: Mapping[str, Any], part: Path, on_bytes: OnBytes) -> None:
    """Append to the part until it has the file's size, across cut connections."""
    with part.open("ab") as output:
        on_bytes(output.tell())
        failures = 0
        while output.tell() < file["bytes"]:
            start = output.tell()
            with suppress(ServiceUnreachable):
                _append(client, file, output, on_bytes)
            if output.tell() > start:
                failures = 0
                continue
            failures += 1
            time.sleep(PAUSE_S * failures)
            if failures == TRIES:
                raise CliError(
                    f"{file['path']}: the connection was cut {TRIES} times; run it again"
                )


def _append(
    client: ApiClient, file: Mapping[str, Any], output: BinaryIO, on_bytes: OnBytes
) -> None:
    start = output.tell()
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with client.stream("GET", str(file["url"]), headers=headers) as response:
        # a service that ignores the range sends the file from its start
        if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:
            output.truncate(0)
            on_bytes(-start)
        for chunk in response.iter_raw():
            output.write(chunk)
            on_bytes(len(chunk))
