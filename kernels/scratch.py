"""Memory that the launches of one call hand on to each other, laid out in a given buffer.

A call that is captured in a CUDA graph, or made a thousand times a second, takes its scratch from
one buffer of its caller; any other call allocates.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch

__all__ = ["Piece", "Scratch", "bytes_of"]

ALIGNMENT = 256
"""Bytes; what an allocation of its own would have."""


class Piece(NamedTuple):
    """One tensor of a call."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it takes, rounded up to the alignment."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def bytes_of(pieces: Mapping[str, Piece]) -> int:
    """Bytes that the pieces of a call take together."""
    return sum(each.bytes for each in pieces.values())


class Scratch:
    """A buffer for one call at a time: calls on one stream follow each other."""

    def __init__(self, memory: torch.Tensor | None, device: torch.device) -> None:
        self._memory = memory
        self._device = device

    @classmethod
    def of_bytes(cls, size: int, device: torch.device) -> Self:
        """Allocate so many bytes once and for all."""
        return cls(torch.empty(size, dtype=torch.uint8, device=device), device)

    @classmethod
    def on_demand(cls, device: torch.device) -> Self:
        """Allocate every piece by itself."""
        return cls(None, device)

    @property
    def bytes(self) -> int:
        """Bytes of the buffer; 0 where every piece is allocated by itself."""
        return 0 if self._memory is None else len(self._memory)

    def lay_out(self, pieces: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
        """Give every piece its memory, not initialized.

        Raises:
            ValueError: if the buffer is too small.
        """
        if self._memory is None:
            return {
                name: torch.empty(piece.shape, dtype=piece.dtype, device=self._device)
                for name, piece in pieces.items()
            }
        if bytes_of(pieces) > self.bytes:
            raise ValueError(f"a scratch of {self.bytes} bytes, need {bytes_of(pieces)}")
        found, start = {}, 0
        for name, piece in pieces.items():
            size = math.prod(piece.shape) * piece.dtype.itemsize
            found[name] = self._memory[start : start + size].view(piece.dtype).view(piece.shape)
            start += piece.bytes
        return found
