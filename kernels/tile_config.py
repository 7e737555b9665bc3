"""How `kernels.tile_linear` is launched: one value, a choice by shape, candidates for tuning.

Candidates are ordered by a model of an H100, none of it measured with these kernels:

    time = max(bytes from memory / 3.0 TB/s, bytes from L2 / 5.5 TB/s, operations / 1400 TOPS)
           / balance + 3 us (+ 1 us where K is split)

Every tile reads its weights and its tokens once through L2, packed weights p bits each: that is
what makes tiles of many outputs and few tokens cheap. Balance is the work of a mean multiprocessor
over that of the busiest.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

from kernels.shared_memory import SHARED_BYTES, LoopConfig

__all__ = ["LaunchConfig", "TileShape", "select_config", "tile_configs"]

MULTIPROCESSORS = 132
REGISTERS = 65536
MOST_ACCUMULATORS = 128
MOST_GROUPED = 32
"""Group sums stay in registers beside the total of the groups and their corrections."""
MEMORY_BYTES_PER_US = 3.0e6
L2_BYTES_PER_US = 5.5e6
OPERATIONS_PER_US = 1.4e9
FIXED_US = 3.0
SPLIT_US = 1.0
MOST_CANDIDATES = 24
SPLITS = (1, 2, 3, 4, 6, 8)
TILES_N = ((64, 4), (128, 4), (128, 8), (256, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """What a launch is chosen by."""

    bits: int
    m: int
    n: int
    """NP."""
    columns: int
    """L."""
    slice_bytes: int
    grouped: bool = False

    def bucket(self) -> Self:
        """Round M up to a power of two, at most 4096: the key of a table."""
        return dataclasses.replace(self, m=min(4096, _power_of_two(self.m)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig(LoopConfig):
    """Tile and launch parameters of one kernel launch.

    Of up to 256 tokens and 64, 128 or 256 outputs, which need not be the rows of a stored tile.
    """

    token_bytes: ClassVar[int] = 1

    group_m: int = 8
    """Tiles of tokens walked before the next tile of weights."""
    x_tma: bool = False
    """Load tokens by tensor descriptor."""
    pdl: bool = False
    """Start before the kernel that writes the tokens has ended."""


def select_config(
    shape: TileShape, table: Mapping[TileShape, LaunchConfig] | None = None
) -> LaunchConfig:
    """Pick the launch for a shape: the measured one, or the first candidate of the model.

    Args:
        shape: any M.
        table: measured launches by `TileShape.bucket`.
    """
    found = (table or {}).get(shape.bucket())
    return _first(shape) if found is None else found


@lru_cache(maxsize=1024)
def _first(shape: TileShape) -> LaunchConfig:
    return tile_configs(shape)[0]


def tile_configs(shape: TileShape) -> list[LaunchConfig]:
    """Launches worth timing for a shape, best guess first, at most 24."""
    ranked = sorted(_candidates(shape), key=lambda config: _predicted_us(config, shape))
    kept = list(dict.fromkeys(ranked))[: MOST_CANDIDATES - 2]
    best = kept[0]
    return [
        best,
        dataclasses.replace(best, x_tma=True),
        dataclasses.replace(best, group_m=16 if shape.m > best.block_m else 1),
        *kept[1:],
    ]


def _candidates(shape: TileShape) -> Iterator[LaunchConfig]:
    widest_m = min(256, max(8, _power_of_two(shape.m)))
    blocks_m = {widest_m, max(8, widest_m // 2), min(widest_m, 128), min(widest_m, 64)}
    widths = [shape.slice_bytes]
    if not shape.grouped:
        widths = [width for width in (128, 64, 32) if width <= shape.slice_bytes]
    for block_m in sorted(blocks_m):
        for block_n, warps in TILES_N:
            most = MOST_GROUPED if shape.grouped else MOST_ACCUMULATORS
            if block_m * block_n // (32 * warps) > most or (block_n > shape.n and block_n > 64):
                continue
            for width in widths:
                stage = _stage_bytes(shape.bits, block_m, block_n, width)
                stages = min(4, SHARED_BYTES // stage)
                if stages < 2:
                    continue
                for splits in SPLITS if shape.m <= 128 else (1,):
                    yield LaunchConfig(
                        block_m=block_m, block_n=block_n, block_k=width, num_warps=warps,
                        num_stages=stages, splits=splits,
                    )  # fmt: skip


def _predicted_us(config: LaunchConfig, shape: TileShape) -> float:
    tiles_m = -(-shape.m // config.block_m)
    tiles_n = -(-shape.n // config.block_n)
    padded_m, padded_n = tiles_m * config.block_m, tiles_n * config.block_n
    memory = shape.columns * (shape.n * shape.bits / 8 + shape.m) + 2 * shape.m * shape.n
    through_l2 = tiles_m * tiles_n * shape.columns * (
        config.block_n * shape.bits / 8 + config.block_m
    )  # fmt: skip
    through_l2 += 8 * padded_m * padded_n * config.splits * (config.splits > 1)
    operations = 2 * padded_m * padded_n * shape.columns
    busy = max(
        memory / MEMORY_BYTES_PER_US,
        through_l2 / L2_BYTES_PER_US,
        operations / OPERATIONS_PER_US,
    )
    programs = tiles_m * tiles_n * config.splits
    resident = _resident(config, shape)
    # programs that share a multiprocessor share its time; too few of them cannot hide latency
    busiest = -(-programs // MULTIPROCESSORS)
    balance = programs / (MULTIPROCESSORS * busiest)
    alone = 1.15 if min(resident, busiest) < 2 else 1.0
    waves = -(-programs // (MULTIPROCESSORS * resident))
    fixed = FIXED_US + SPLIT_US * (config.splits > 1) + 0.5 * (waves - 1)
    # a narrow product ends before the next codes are unpacked
    narrow = 1 + 6.4 / config.block_k if shape.m > 128 else 1 + 1.6 / config.block_k
    return busy * narrow * alone / balance + fixed


def _resident(config: LaunchConfig, shape: TileShape) -> int:
    """Programs that fit on one multiprocessor."""
    stage = _stage_bytes(shape.bits, config.block_m, config.block_n, config.block_k)
    threads = 32 * config.num_warps
    accumulators = config.block_m * config.block_n // threads * (2 if shape.grouped else 1)
    registers = min(255, accumulators + 72)
    return max(
        1, min(SHARED_BYTES // (stage * config.num_stages), REGISTERS // (registers * threads))
    )


def _stage_bytes(bits: int, block_m: int, block_n: int, width: int) -> int:
    """Shared memory of one turn: all runs and all slices."""
    turn = 8 // (bits & -bits)
    return width * (bits * turn // 8 * block_n + turn * block_m)


def _power_of_two(m: int) -> int:
    return 1 << max(0, m - 1).bit_length()
