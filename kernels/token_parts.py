"""How many programs share a token, and where they meet: see `kernels._token_kernel`.

    slots   int64 [log2(MOST_PARTS) + 1, MOST_PROGRAMS]

A row for every number of parts: the slots of a token are all marked by every launch that uses any
of them, and tokens lie elsewhere where there are other parts. In a row a token follows the other.

All programs of a launch have to be on the GPU at once. They may be as many as there are
multiprocessors: one fits on each once what runs there has ended, and nothing there waits for them.
"""

from functools import lru_cache

import torch

__all__ = [
    "MOST_PARTS",
    "MOST_PROGRAMS",
    "make_slots",
    "parts_that_fit",
    "register_options",
    "runs_to_meet",
    "share_of",
    "slots_of",
]

MOST_PARTS = 32
"""A lane waits for a part."""
MOST_PROGRAMS = 128
"""Of one launch; an H100 has 132 multiprocessors."""
VECTOR = 16
"""Codes that are written together."""
REGISTERS = 1 << 16
"""Of a multiprocessor."""
MOST_REGISTERS = 255
"""Of a thread."""


def make_slots(device: torch.device) -> torch.Tensor:
    """Zeros where the parts of tokens meet, for the launches of one stream.

    Launches at the same time would take each other's ranges.
    """
    shape = (MOST_PARTS.bit_length(), MOST_PROGRAMS)
    return torch.zeros(shape, dtype=torch.int64, device=device)


def slots_of(slots: torch.Tensor, parts: int) -> torch.Tensor:
    """Those of launches with so many parts."""
    return slots[parts.bit_length() - 1]


def parts_that_fit(wanted: int, tokens: int, slots: torch.Tensor | None) -> int:
    """The most parts up to those wanted whose programs are all on the GPU at once; 1 without slots.

    Raises:
        ValueError: if the parts wanted are no power of two up to 32.
    """
    if wanted & (wanted - 1) or not 1 <= wanted <= MOST_PARTS:
        raise ValueError(f"{wanted} parts, need a power of two up to {MOST_PARTS}")
    if slots is None:
        return 1
    room = _programs_at_once(slots.device.index) if slots.is_cuda else MOST_PROGRAMS
    while wanted > 1 and wanted * tokens > room:
        wanted //= 2
    return wanted


def share_of(columns: int, parts: int, group: int = 1) -> int:
    """Columns of a part: whole vectors and whole groups, a power of two each."""
    unit = max(VECTOR, group)
    return -(-columns // (parts * unit)) * unit


def runs_to_meet(parts: int, *, interpreted: bool) -> int:
    """Launches until all have met: one, but where programs run one after another two."""
    return 2 if interpreted and parts > 1 else 1


def register_options(parts: int, num_warps: int) -> dict[str, int]:
    """Launch options of parts: half of a multiprocessor's registers are one program's.

    By itself the assembler keeps to so few that a multiprocessor could hold its most threads, and
    asks for memory late to need them for a shorter time. The other half is for the product before,
    beside which parts begin.
    """
    if parts == 1:
        return {}
    return {"maxnreg": min(MOST_REGISTERS, REGISTERS // (2 * 32 * num_warps))}


@lru_cache
def _programs_at_once(device_index: int | None) -> int:
    count = torch.cuda.get_device_properties(device_index or 0).multi_processor_count
    return min(MOST_PROGRAMS, count)
