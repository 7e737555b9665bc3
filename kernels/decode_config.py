"""How `kernels.decode_linear` is launched: one value, a choice by shape, candidates for tuning.

Candidates are ranked by arithmetic for a GPU of 132 multiprocessors, an H100. Instructions and
registers are those of the compiled kernel; memory speed and the ends of a launch are fitted to what
one token took there with dependent launches: 22016x4096 at 6, 7 and 8 bits 22.7, 26.5 and 29.3 us,
4096x4096 at 2 and 4 bits 2.19 and 3.19 us.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

__all__ = ["MAX_TOKENS", "DecodeShape", "LaunchConfig", "decode_configs", "select_config"]

MAX_TOKENS = 8
SLICES = 8
WARP = 32
LOAD_BYTES = 16
LOAD_WORDS = 4

GROUP_BITS = 24
GROUP_SIZE = 128
"""Assumed where scales belong to groups."""

PROCESSORS = 132
CYCLES_PER_US = 1755
MEMORY_BYTES_PER_US = 3.1e6
BYTES_IN_FLIGHT = 48 << 10
"""On a multiprocessor, for full memory speed; programs that start or end read nothing."""
REGISTERS = 1 << 16
MAX_THREADS = 2048
MAX_REGISTERS = 176
"""Of a thread, by the estimate below; beyond, too few threads are resident."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Tile and launch parameters of one kernel launch."""

    lane_rows: int
    """RL, 1..32, a power of two: rows beside each other in a warp."""
    thread_rows: int
    """RT, a power of two: rows that share the activations of a thread."""
    turn_blocks: int
    """KB, a power of two: blocks of 8G columns read at a time; best all of them."""
    num_warps: int
    split_k: int = 1
    """Programs that share the columns of a tile; the last to finish adds up, in order."""
    launch_pdl: bool = True
    """Start while the kernel before still runs: weights are read at once, tokens when it ends."""
    max_registers: int | None = None
    """Registers of a thread; None leaves them to the compiler."""

    @property
    def rows(self) -> int:
        """Rows of a program."""
        return self.lane_rows * self.thread_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape:
    """What a launch depends on."""

    bits: int
    """1..8 of a weight."""
    n: int
    """N outputs."""
    columns: int
    """L."""
    slice_bytes: int
    """G."""
    m: int
    """1..8 tokens."""
    grouped: bool = False
    """Whether scales belong to groups."""

    @property
    def blocks(self) -> int:
        """Blocks of 8G columns."""
        return self.columns // (SLICES * self.slice_bytes)


@lru_cache(maxsize=1024)
def select_config(
    *, bits: int, n: int, columns: int, slice_bytes: int, m: int, grouped: bool = False
) -> LaunchConfig:
    """Pick the launch for a shape: the first of `decode_configs`."""
    shape = DecodeShape(
        bits=bits, n=n, columns=columns, slice_bytes=slice_bytes, m=m, grouped=grouped
    )
    return min(_fitting(shape), key=lambda config: _microseconds(config, shape))


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
        limit: how many at most; the last is the first without dependent launch.
    """
    shape = DecodeShape(
        bits=bits, n=n, columns=columns, slice_bytes=slice_bytes, m=m, grouped=grouped
    )
    ranked = sorted(_fitting(shape), key=lambda config: _microseconds(config, shape))
    return (*ranked[: limit - 1], replace(ranked[0], launch_pdl=False))


def _fitting(shape: DecodeShape) -> Iterator[LaunchConfig]:
    """Every launch in which no lane repeats the read of another and registers suffice."""
    slice_lanes = shape.slice_bytes // LOAD_BYTES
    one_turn = 1 << (shape.blocks - 1).bit_length()
    widths = (2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4)
    for warps, lane_rows, thread_rows, split in product(*widths):
        turn = one_turn
        while turn:
            config = LaunchConfig(
                lane_rows=lane_rows,
                thread_rows=thread_rows,
                turn_blocks=turn,
                num_warps=warps,
                split_k=split,
            )
            lanes = slice_lanes * lane_rows * turn
            narrow = config.rows <= 64 and slice_lanes * lane_rows <= WARP
            # the scales of a turn are loaded by the lanes that use them only while they are few
            few = not shape.grouped or lane_rows * turn < WARP * warps
            split_fits = split == 1 or turn * split <= one_turn
            held = _registers(config, shape) <= MAX_REGISTERS
            if narrow and few and split_fits and held and lanes >= WARP * warps:
                yield config
            turn //= 2
    yield _smallest(shape)


def _smallest(shape: DecodeShape) -> LaunchConfig:
    """The launch for shapes so small that nothing else fits."""
    return LaunchConfig(
        lane_rows=min(16, WARP * LOAD_BYTES // shape.slice_bytes),
        thread_rows=1,
        turn_blocks=1,
        num_warps=1,
    )


def _loads(config: LaunchConfig, shape: DecodeShape) -> float:
    """Loads of a thread for one run of a turn and one of its rows."""
    lanes = shape.slice_bytes // LOAD_BYTES * config.lane_rows * config.turn_blocks
    return max(1.0, lanes / (WARP * config.num_warps))


def _turns(config: LaunchConfig, shape: DecodeShape) -> int:
    return -(-shape.blocks // (config.split_k * config.turn_blocks))


def _registers(config: LaunchConfig, shape: DecodeShape) -> float:
    """Estimate the registers of a thread, as read from compiled kernels."""
    words = LOAD_WORDS * _loads(config, shape)
    in_turn = words * config.thread_rows
    sums = in_turn * shape.m
    if shape.grouped:
        # floats of whole loads, a load's words of one row and token, scales and zero-points
        sums = words * shape.m + config.thread_rows * _loads(config, shape) * (shape.m + 3)
    again = 2 if _turns(config, shape) > 1 else 1
    fields = 2 if shape.bits in {3, 5, 6, 7} else 1
    return 28 + in_turn * shape.bits * again + sums * (fields + again - 1) + words * 2 * shape.m


def _microseconds(config: LaunchConfig, shape: DecodeShape) -> float:
    """Estimate a launch: the slowest of memory, issue and load units, then its ends."""
    warps, turns, loads = config.num_warps, _turns(config, shape), _loads(config, shape)
    programs = -(-shape.n // config.rows) * config.split_k
    # programs are spread evenly at best
    most = -(-programs // PROCESSORS)
    uneven = 0.5 + 0.5 * most * PROCESSORS / programs
    resident = min(
        most,
        MAX_THREADS // (WARP * warps),
        int(REGISTERS / (WARP * warps * max(40.0, _registers(config, shape)))),
    )
    pieces = shape.bits * loads * config.thread_rows
    flying = resident * warps * WARP * LOAD_BYTES * pieces
    held = min(1.0, flying / BYTES_IN_FLIGHT)
    bits = shape.bits + (GROUP_BITS / GROUP_SIZE if shape.grouped else 0.0)
    total_bytes = shape.n * shape.columns * bits / 8
    memory = total_bytes / MEMORY_BYTES_PER_US * uneven / (0.4 + 0.6 * held)

    per_processor = programs / PROCESSORS * uneven * warps
    fields = 2 if shape.bits in {3, 5, 6, 7} else 1
    words = SLICES * LOAD_WORDS * loads * config.thread_rows * fields
    issue = 140.0 + 14 * config.thread_rows * shape.m
    issue += turns * (words * (1.6 + shape.m) + pieces + SLICES * loads * shape.m * 1.5)
    if shape.grouped:
        # four groups a block; the activations of a lane are summed once for all rows
        issue += turns * loads * 4 * (config.thread_rows * (10 + 4 * shape.m) + 10 * shape.m)
    # four schedulers issue; a 16-byte load of a warp takes four cycles
    issued = per_processor * issue / 4 / CYCLES_PER_US
    loaded = per_processor * turns * (pieces + SLICES * loads * shape.m) * 4 / CYCLES_PER_US
    # the last program of a processor computes alone, about every other cycle; warps that read
    # less than whole lines in a row cost the memory some order
    alone = issue * 2 / CYCLES_PER_US
    scatter = 0.05 * WARP * LOAD_BYTES / (config.lane_rows * shape.slice_bytes)
    ends = 0.2 + alone + scatter + 0.045 * warps + (0.5 if config.split_k > 1 else 0.0)
    return max(memory, issued, loaded) + 0.05 * (issued + loaded) + ends
