"""Where the hidden states of all windows live: on the device, in main memory, or on disk.

Blocks run on their device wherever the chains are; windows are brought there some at a time, so
every place gives the same bytes. Without a budget, `FREE_PART` of what is free is taken, after what
one block needs to learn was set aside.

A chain on disk is a file that has no name any more: it is gone with the process, however that ends.

Shape legend: W windows, T tokens, H hidden size.
"""

import errno
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import torch

from engine.fields import check_range, known_fields

__all__ = ["ChainMemory", "Place", "Placement", "free_bytes"]

FREE_PART = 0.7
"""Of what is free beside the block; the rest is for fragments and for others."""
MEMORY_INFO = Path("/proc/meminfo")
MAX_BYTES = 1 << 50


class Place(StrEnum):
    """Where a chain lives."""

    DEVICE = "device"
    """Beside the block, on the GPU."""
    HOST = "host"
    """In main memory."""
    DISK = "disk"
    """In a file that is mapped into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainMemory:
    """What the chains may take; None measures what is free."""

    device_bytes: int | None = None
    """Of a GPU's memory; 0 keeps the chains away from it."""
    host_bytes: int | None = None
    """Of main memory; 0 with `device_bytes` 0 sends them to disk."""

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes"):
            if getattr(self, name) is not None:
                check_range(f"chain_memory.{name}", getattr(self, name), 0, MAX_BYTES)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            SpecError: naming the field, the value and what would do.
        """
        return cls(**known_fields(cls, record, "chain_memory."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A place that was chosen, and how a chain is made there."""

    place: Place
    device: torch.device
    """Where blocks run."""
    directory: Path
    """Where files of chains are made."""

    @classmethod
    def choose(
        cls,
        chain_bytes: int,
        block_bytes: int,
        memory: ChainMemory,
        device: torch.device,
        directory: Path,
    ) -> Self:
        """Take the fastest place that has room.

        Args:
            chain_bytes: of all chains that are alive at once.
            block_bytes: what one block needs beside them.
            memory: what the chains may take.
            device: where blocks run.
            directory: exists; takes the files where it comes to that.
        """
        on_gpu, host = device.type != "cpu", torch.device("cpu")
        if on_gpu and chain_bytes <= _budget(memory.device_bytes, device, block_bytes):
            place = Place.DEVICE
        elif chain_bytes <= _budget(memory.host_bytes, host, 0 if on_gpu else block_bytes):
            place = Place.HOST
        else:
            place = Place.DISK
        return cls(place=place, device=device, directory=directory)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Make a chain ``[W, T, H]`` with nothing written yet.

        Raises:
            OSError: if the disk is full.
        """
        match self.place:
            case Place.DEVICE:
                return torch.empty(*shape, dtype=dtype, device=self.device)
            case Place.HOST:
                return torch.empty(*shape, dtype=dtype)
            case Place.DISK:
                return _map_file(self.directory, shape, dtype)


def free_bytes(device: torch.device) -> int:
    """Measure what could still be allocated on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    # what the page cache holds can be had back, unlike MemFree's opposite
    for line in MEMORY_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(errno.ENODATA, "no MemAvailable; set the memory of the chains", str(MEMORY_INFO))


def _budget(given: int | None, device: torch.device, set_aside: int) -> float:
    if given is not None:
        return given
    return FREE_PART * max(0, free_bytes(device) - set_aside)


def _map_file(directory: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    count = math.prod(shape)
    size = count * dtype.itemsize
    descriptor, name = tempfile.mkstemp(prefix="chain-", dir=directory)
    try:
        Path(name).unlink()
        # a hole would end the process by a signal when the disk is full
        os.posix_fallocate(descriptor, 0, size)
        opened = f"/proc/self/fd/{descriptor}"
        return torch.from_file(opened, shared=True, size=count, dtype=dtype).view(*shape)
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for {size} bytes of hidden states; free some, or give the chains more memory",
            str(directory),
        ) from error
    finally:
        os.close(descriptor)
