"""Files of a model on their way to a folder: parallel, resumable, verified, cancellable."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock

from api.errors import HubUnavailable
from api.hub.base import OnProgress, RemoteFile

__all__ = ["Fetch", "Transfer", "matches_content", "matches_file"]

PARALLEL_FILES = 4
REPORT_INTERVAL_S = 0.5
PART_SUFFIX = ".part"

OnBytes = Callable[[int], None]
Fetch = Callable[[RemoteFile, Path, OnBytes], None]
"""Brings one file to a path, going on from what is there, and tells how many bytes are there."""


class Transfer:
    """One download of several files into one folder."""

    def __init__(self, fetch: Fetch, folder: Path) -> None:
        self._fetch = fetch
        self._folder = folder
        self._stopped = Event()
        self._lock = Lock()
        self._done: dict[str, int] = {}

    def run(self, files: Sequence[RemoteFile], on_progress: OnProgress) -> None:
        """Bring all files; an exception from `on_progress` stops it and is raised.

        Raises:
            HubUnavailable: if a file does not arrive, or not as announced.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        total = sum(each.bytes for each in files)
        with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="download") as pool:
            try:
                waiting: set[Future[None]] = {pool.submit(self._bring, each) for each in files}
                while waiting:
                    finished, waiting = wait(
                        waiting, timeout=REPORT_INTERVAL_S, return_when=FIRST_EXCEPTION
                    )
                    for each in finished:
                        each.result()
                    on_progress(self._count(), total)
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _bring(self, file: RemoteFile) -> None:
        target = self._folder / file.path
        # a complete file was verified before it got its name
        if not target.is_file() or target.stat().st_size != file.bytes:
            part = target.with_name(target.name + PART_SUFFIX)
            self._fetch(file, part, lambda done: self._note(file.path, done))
            if not matches_file(part, file):
                part.unlink()
                raise HubUnavailable(f"{file.path} did not arrive as the Hub announced it.")
            part.replace(target)
        self._note(file.path, file.bytes)

    def _note(self, path: str, done: int) -> None:
        if self._stopped.is_set():
            raise _Stopped
        with self._lock:
            self._done[path] = done

    def _count(self) -> int:
        with self._lock:
            return sum(self._done.values())


class _Stopped(Exception):
    """Another file failed, or the caller stopped the download."""


def matches_content(content: bytes, file: RemoteFile) -> bool:
    """Whether bytes are the announced file: their number, and their hash where that is known."""
    if len(content) != file.bytes:
        return False
    if file.sha256 is not None:
        return hashlib.sha256(content).hexdigest() == file.sha256
    if file.git_sha1 is not None:
        return _git_sha1(content) == file.git_sha1
    return True


def matches_file(path: Path, file: RemoteFile) -> bool:
    """Whether a local file is the announced one: its size, and its hash where that is known."""
    if path.stat().st_size != file.bytes:
        return False
    if file.sha256 is not None:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
    if file.git_sha1 is not None:
        return _git_sha1(path.read_bytes()) == file.git_sha1
    return True


def _git_sha1(content: bytes) -> str:
    digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest()
