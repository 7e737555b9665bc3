"""Files that survive a power cut: synced first, then renamed into place."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = ["save_tensors", "sync_path", "write_atomically"]

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; durable only with `sync_path`.

    Args:
        tensors: contiguous, on the CPU, none sharing memory with another.
        path: replaced if it exists.
        metadata: of the file's header.

    Raises:
        OSError: with the system's number, so that a full disk is known as one.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        # the library has the number in its words alone
        found = SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


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
