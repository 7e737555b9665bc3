"""What a step sends to the device: only what changed, in one copy out of pinned memory.

The host mirrors the words that a device keeps of its sequences (`kernels.step_state`). A step that
goes on where the last one ended finds nothing to send: lengths advance on the device, the token is
there already, and pages are compared with those sent before. Everything else goes into an arena of
int32: what a chunk of a prompt computes, then offsets of changed words and their values. Several
arenas take turns, so that one is filled while another is still being copied; on the device all go
to one place, for a stream copies nothing before what it was given earlier has ended.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engine.inference.steps import SequenceStep
from kernels.step_state import SequenceState, write_words

__all__ = ["HostArena", "StepBuffers", "make_arenas"]

ALIGNMENT = 4
"""Integers: kernels are compiled apart for addresses that 16 bytes do not divide."""
SLACK = 32 * ALIGNMENT
"""What aligning takes at most; a step adds about a dozen pieces."""
UNKNOWN = -1
"""A length that only the device knows."""


def make_arenas(count: int, size: int, device: torch.device) -> list["HostArena"]:
    """Allocate arenas that take turns in one stream; see `HostArena`."""
    first = HostArena(size, device)
    return [first, *(HostArena(size, device, first.target) for _ in range(count - 1))]


class HostArena:
    """Pinned int32 memory that one step is written to, and its copy on the device."""

    def __init__(self, size: int, device: torch.device, target: torch.Tensor | None = None) -> None:
        """Allocate `size` integers of one step and the room to align them.

        Args:
            size: at most.
            device: where they go.
            target: of another arena of this size and stream, to copy to as well; None allocates.
        """
        on_gpu, size = device.type == "cuda", size + SLACK
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._view = self._host.numpy()
        if not on_gpu:
            # on a CPU the host's memory is the device's
            target = self._host
        elif target is None:
            target = torch.zeros(size, dtype=torch.int32, device=device)
        self.target = target
        self._sent = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._used = 0

    def begin(self) -> None:
        """Start over, once the last copy has left."""
        if self._sent is not None:
            self._sent.synchronize()
        self._used = 0

    def add(self, values: Sequence[int] | np.ndarray) -> slice:
        """Append integers; returns where they lie, aligned."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        place = slice(start, start + len(values))
        self._view[place] = values
        self._used = place.stop
        return place

    def send(self) -> torch.Tensor:
        """Copy what was added, behind what the stream does; int32 on the device."""
        if self._sent is not None and self._used:
            self.target[: self._used].copy_(self._host[: self._used], non_blocking=True)
            self._sent.record()
        return self.target


class StepBuffers:
    """The state of all slots on the device and its mirror on the host."""

    def __init__(self, state: SequenceState, page_size: int) -> None:
        self.state = state
        self.page_size = page_size
        self.slots, self.pages_per_sequence = state.block_table.shape
        self._lengths = [0] * self.slots
        self._pages: list[tuple[int, ...]] = [()] * self.slots
        self._rows: tuple[int, ...] = ()
        self._offsets: list[int] = []
        self._values: list[int] = []

    @property
    def scratch(self) -> int:
        """The slot of rows that only fill up."""
        return self.slots - 1

    def forget(self, slot: int) -> None:
        """Take a slot for empty: the next sequence in it says everything anew."""
        self._lengths[slot] = UNKNOWN
        self._pages[slot] = ()

    def place(self, step: SequenceStep, *, advances: bool) -> None:
        """Note what a sequence's step changes.

        Args:
            step: of a slot that is open.
            advances: whether the device counts its token by itself, which needs the length before
                the step there; otherwise the length behind it is sent.
        """
        slot = step.slot
        before = step.start if advances else step.start + step.count
        if self._lengths[slot] != before or not advances:
            self._set(slot, before)
        if advances and step.token_ids:
            self._set(self.slots + slot, step.token_ids[0])
        self._lengths[slot] = UNKNOWN if step.drafts else step.start + step.count
        if step.page_ids != self._pages[slot]:
            self._place_pages(slot, step.page_ids)

    def choose_rows(self, slots: Sequence[int], rows: int) -> None:
        """Note the slots of a batch, filled up to so many rows."""
        wanted = (*slots, *[self.scratch] * (rows - len(slots)))
        if wanted != self._rows[:rows]:
            first = 2 * self.slots
            self._offsets += range(first, first + rows)
            self._values += wanted
            self._rows = wanted + self._rows[rows:]

    def pack(self, arena: HostArena) -> tuple[slice, slice]:
        """Move what was noted into an arena: offsets and values."""
        placed = arena.add(self._offsets), arena.add(self._values)
        self._offsets, self._values = [], []
        return placed

    def apply(self, sent: torch.Tensor, placed: tuple[slice, slice]) -> None:
        """Write what an arena brought to the device."""
        offsets, values = placed
        if offsets.stop > offsets.start:
            write_words(self.state, sent[offsets], sent[values])

    def _set(self, offset: int, value: int) -> None:
        self._offsets.append(offset)
        self._values.append(value)

    def _place_pages(self, slot: int, page_ids: tuple[int, ...]) -> None:
        known = self._pages[slot]
        # pages are added at the end; other changes happen where a sequence is new
        same = len(known) if page_ids[: len(known)] == known else 0
        first = 3 * self.slots + slot * self.pages_per_sequence + same
        added = page_ids[same:]
        self._offsets += range(first, first + len(added))
        self._values += added
        self._pages[slot] = page_ids
