"""Artifacts as files below one folder; several machines may share it over a network file system."""

import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from api.errors import FileNotInArtifact
from api.settings import Settings
from api.storage.base import ObjectStore

__all__ = ["LocalStore", "check_key", "create_store"]

COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}")
MAX_COMPONENTS = 10
INCOMING = ".incoming"
"""Files on their way in; no key starts with a dot."""


def create_store(settings: Settings) -> ObjectStore:
    """Open the store that the settings name."""
    return LocalStore(settings.storage_root)


class LocalStore:
    """An `ObjectStore` on a file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put_file(self, key: str, path: Path) -> None:
        """Link or copy to a temporary name, flush, rename."""
        target = self._locate(key)
        incoming = self._root / INCOMING / uuid4().hex
        incoming.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _bring_in(path, incoming)
            _flush(incoming)
            incoming.replace(target)
        finally:
            incoming.unlink(missing_ok=True)
        # the rename itself must survive a power cut: the job is marked as done right after it
        _flush(target.parent)
        _flush(self._root)

    def path_of(self, key: str) -> Path:
        """The file itself."""
        path = self._locate(key)
        # a link that someone put below the root must not lead a download out of it
        if not path.is_file() or not path.resolve().is_relative_to(self._root.resolve()):
            raise FileNotInArtifact(param="path")
        return path

    def open(self, key: str) -> BinaryIO:
        """The file, open for reading."""
        return self.path_of(key).open("rb")

    def exists(self, key: str) -> bool:
        """Whether the file is there."""
        return self._locate(key).is_file()

    def delete(self, prefix: str) -> None:
        """Remove the file or the folder."""
        path = self._locate(prefix)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _locate(self, key: str) -> Path:
        return self._root.joinpath(*check_key(key).split("/"))


def check_key(key: str) -> str:
    """Return a key that is one.

    Raises:
        ValueError: if a component could mean another folder, or hide a file.
    """
    parts = key.split("/")
    if len(parts) > MAX_COMPONENTS or not all(COMPONENT.fullmatch(part) for part in parts):
        raise ValueError(f"{key!r} is no key: use [A-Za-z0-9_.-] between slashes")
    return key


def _bring_in(path: Path, incoming: Path) -> None:
    try:
        # a second name costs no space, and a checkpoint may be as large as the disk allows
        incoming.hardlink_to(path)
    except OSError:
        # another file system, or one without links
        shutil.copyfile(path, incoming)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
