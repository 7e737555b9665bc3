"""Named numbers of every slot of a batch, on its device; written a slot at a time."""

from collections.abc import Mapping

import torch

__all__ = ["SlotTable", "send"]


class SlotTable:
    """Columns of float32, int32 and int64; a column is one contiguous tensor ``[S]``."""

    def __init__(
        self, slots: int, columns: Mapping[str, torch.dtype], device: torch.device
    ) -> None:
        # two blocks, for numbers of four and of eight bytes, so that a slot is two copies
        self._names: dict[torch.dtype, list[str]] = {torch.int32: [], torch.int64: []}
        self._dtypes = dict(columns)
        for name, dtype in columns.items():
            self._names[torch.int64 if dtype is torch.int64 else torch.int32].append(name)
        self._blocks = {
            dtype: torch.zeros(len(names), slots, dtype=dtype, device=device)
            for dtype, names in self._names.items()
        }

    def column(self, name: str) -> torch.Tensor:
        """Give the numbers of all slots: ``[S]``; what is written to it shows in the table."""
        dtype = self._dtypes[name]
        for block, names in self._names.items():
            if name in names:
                return self._blocks[block][names.index(name)].view(dtype)
        raise KeyError(name)

    def write(self, slot: int, values: Mapping[str, float]) -> None:
        """Write all columns of a slot, in order with what runs on the current stream."""
        for block, names in self._names.items():
            row = torch.empty(len(names), dtype=block)
            for place, name in enumerate(names):
                row[place : place + 1].view(self._dtypes[name]).fill_(values[name])
            send(row, self._blocks[block][:, slot])


def send(values: torch.Tensor, target: torch.Tensor) -> None:
    """Copy fresh host memory to a tensor of a device, without waiting for the device.

    Args:
        values: on the CPU; nobody writes to it any more.
        target: of the same shape and dtype.
    """
    if target.is_cuda:
        # the allocator of pinned memory keeps it until the copy is done
        values = values.pin_memory()
    target.copy_(values, non_blocking=True)
