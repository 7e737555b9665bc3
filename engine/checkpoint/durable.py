"""Files that survive a power cut: synced first, then renamed into place."""

import os
from pathlib import Path

__all__ = ["sync_path", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, replacing an old one in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    sync_path(partial)
    partial.replace(path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
