"""Where a tensor of the engine's model lies in the files of a source; torch-free.

Nearly always under its own name. Experts are the exception (`ExpertFiles`): some files hold them
under other names, others all in one tensor, of which one matrix or half of its rows is meant.

Shape legend: E experts, I intermediate size, H hidden size.
"""

import re
from collections.abc import Container
from dataclasses import dataclass

from engine.families.base import Family

__all__ = ["StoredPart", "find_part"]

EXPERT = re.compile(r"(?P<number>\d+)\.(?P<linear>gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A tensor of a file, or a part of it."""

    tensor: str
    expert: int | None = None
    """Index along the first dimension."""
    half: int | None = None
    """0 for the first half of the rows, 1 for the second, None for all."""

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part in a tensor of that shape; () where there is no such part."""
        if self.expert is None:
            return whole
        if len(whole) != 3 or self.expert >= whole[0]:
            return ()
        rows, columns = whole[1:]
        return (rows if self.half is None else rows // 2, columns)

    def rows(self, whole: tuple[int, ...]) -> slice:
        """The rows of the part in a tensor ``[E, rows, columns]``."""
        count = whole[1]
        if self.half is None:
            return slice(0, count)
        return slice(self.half * (count // 2), (self.half + 1) * (count // 2))


def find_part(family: Family, name: str, stored: Container[str]) -> StoredPart | None:
    """Find a tensor of the model among those of its files.

    Args:
        family: of the model.
        name: full, as `model.layers.0.mlp.experts.3.up_proj.weight`.
        stored: the names in the files.
    """
    if name in stored:
        return StoredPart(tensor=name)
    if family.experts is None:
        return None
    older = name
    for ours, theirs in family.experts.older_names:
        older = older.replace(ours, theirs)
    if older in stored:
        return StoredPart(tensor=older)
    return _find_fused(name, family.experts.module, stored)


def _find_fused(name: str, module: str, stored: Container[str]) -> StoredPart | None:
    prefix, found, rest = name.partition(f".{module}.")
    match = EXPERT.fullmatch(rest) if found else None
    if match is None:
        return None
    linear, number = match["linear"], int(match["number"])
    halves = {"gate_proj": 0, "up_proj": 1}
    fused = "down_proj" if linear == "down_proj" else "gate_up_proj"
    tensor = f"{prefix}.{module}.{fused}"
    if tensor not in stored:
        return None
    return StoredPart(tensor=tensor, expert=number, half=halves.get(linear))
