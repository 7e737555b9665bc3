"""How `kernels.tile_linear` is launched: one value, a choice by shape, candidates for tuning."""

import dataclasses
from dataclasses import dataclass
from typing import Self

__all__ = ["LaunchConfig", "select_config", "tile_configs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Tile and launch parameters of one kernel launch."""

    block_m: int
    """8..256 tokens."""
    block_n: int
    """64, 128 or 256 outputs; need not be the rows of a stored tile."""
    block_k: int
    """Columns of one product, 32..128; a stored slice is cut to it."""
    num_warps: int
    num_stages: int
    splits: int = 1
    """Programs that share the K of one tile."""
    group_m: int = 8
    """Tiles of tokens walked before the next tile of weights."""
    x_tma: bool = False
    """Load tokens by tensor descriptor."""
    pdl: bool = False
    """Start before the kernel that writes the tokens has ended."""

    def fitted(self, slice_bytes: int, *, grouped: bool) -> Self:
        """Hold the width of a product to a stored slice; a scale group takes whole ones."""
        block_k = slice_bytes if grouped else min(self.block_k, slice_bytes)
        return dataclasses.replace(self, block_k=block_k)


def select_config(*, bits: int, m: int, n: int, columns: int, grouped: bool = False) -> LaunchConfig:
    return LaunchConfig(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3)
