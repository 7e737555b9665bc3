"""What a peer is given and what it gives back: windows of tokens in, weights on a grid out.

A peer's stored bits are `bits + (SCALE_BITS + bits) / group`: codes and a zero-point of that width
and a float16 scale for each group, as AutoRound's and compressed-tensors' packed formats hold
them. (Ours holds an 8-bit zero-point: `bits + 24 / group`.)

Shape legend: N rows, K columns, G columns of a group.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.architecture import LinearShape
from engine.spec import FULL_BITS, SCALE_BITS, QuantSpec, WeightGrid

__all__ = ["Peer", "PeerJob", "check_levels", "grid_of", "stored_bits"]

CHECKED_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJob:
    """One quantization by somebody else's package."""

    model_dir: Path
    tokens: torch.Tensor
    """int64 ``[windows, length]``, the windows that our methods calibrate with."""
    grid: WeightGrid
    a_bits: int
    """16 leaves activations alone; else one asymmetric dynamic grid a token."""
    seed: int
    steps: int | None
    """Training steps of a block; None takes the package's default."""
    device: str

    @property
    def has_activations(self) -> bool:
        """Whether activations are rounded as well."""
        return self.a_bits != FULL_BITS


class Peer(Protocol):
    """A package that quantizes."""

    def quantize(self, job: PeerJob) -> dict[str, torch.Tensor]:
        """Quantize every linear of the decoder layers.

        Returns:
            By the full name of the linear its weight ``[N, K]`` on the CPU, rounded to its grid
            and multiplied out.

        Raises:
            ImportError: the package is not installed.
        """


def grid_of(spec: QuantSpec, linears: Iterable[LinearShape]) -> WeightGrid:
    """The one grid of all linears.

    Raises:
        ValueError: if the peers have no such grid.
    """
    grids = {spec.weight_grid(each.name) for each in linears}
    grid = grids.pop() if len(grids) == 1 else None
    if grid is None or grid.bit_balance or grid.half_step or grid.symmetric:
        raise ValueError(f"{spec.notation} is not possible: peers have one uniform grid for all")
    return grid


def stored_bits(grid: WeightGrid, linears: Iterable[LinearShape]) -> float:
    """Bits of a weight, scales and zero-points included, as peers store them."""
    total = weights = 0.0
    for each in linears:
        group = grid.group_of(each.in_features)
        total += each.weights * (grid.bits + (SCALE_BITS + grid.bits) / group)
        weights += each.weights
    return total / weights


def check_levels(
    weights: Mapping[str, torch.Tensor], grid: WeightGrid, linears: Iterable[LinearShape]
) -> None:
    """Refuse weights that are not on a grid of so many levels, or are not there.

    Raises:
        ValueError: naming the linear.
    """
    for each in linears:
        weight = weights.get(each.name)
        if weight is None or weight.shape != (each.out_features, each.in_features):
            raise ValueError(f"{each.name} was not quantized")
        groups = weight[:CHECKED_ROWS].float().reshape(-1, grid.group_of(each.in_features))
        ranked = groups.sort(-1).values
        steps = ranked.diff(dim=-1)
        # two codes are at least half the largest step apart; rounding in bfloat16 is far below
        is_step = steps > 1e-3 * ranked.abs().amax(-1, keepdim=True)
        levels = int(is_step.sum(-1).max()) + 1
        if levels > 1 << grid.bits:
            raise ValueError(f"{each.name} holds {levels} levels, more than {grid.bits} bits have")
