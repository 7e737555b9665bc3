"""How `kernels.prefill_linear` is launched.

Candidates for groups of scales are ordered by a model of an H100. For one group of G columns of a
tile, in clocks of a multiprocessor:

    tensor cores       BN BM G / 4096, and 100 in which they wait for the first codes of a round
    instructions       (2 BN BM + BN G / 4 (7/2 + 2 more for every further field)
                       + 100 threads of bookkeeping for each warp and piece) / 128
    bytes through L2   G (BM + p BN / 8) / 26

The largest of the three counts, times the tiles of the busiest multiprocessor. Measured, programs
of eight warps took the sum of the first two instead: 86 us at 4 bits and 4096x4096x2048, where the
model has 57. Those that may do better are listed last until they are timed.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from kernels.shared_memory import SHARED_BYTES, turn_slices

__all__ = [
    "GroupShape",
    "PrefillConfig",
    "group_configs",
    "prefill_configs",
    "select_group_config",
    "select_prefill_config",
]

SCRATCH_BYTES = 24 * 1024
TERMS_BYTES = 4 * 1024
"""Scales and corrections of a small tile, and what the driver keeps for itself."""
GROUP_SCRATCH_BYTES = 12 * 1024
"""Results of a piece, not of a tile, change their layout in shared memory."""
WIDE_SCRATCH_BYTES = 4608
"""Of a warp whose results are float32."""
PROCESSORS = 132
PRODUCTS_A_CLOCK = 4096
LANES = 128
L2_BYTES_A_CLOCK = 26
IDLE_CLOCKS = 100
BOOKKEEPING = 32
"""Instructions of a warp for a piece."""
ORDERING = 60
"""Instructions of a warp for an order."""
ROOMY_OUTPUTS = 128 * 128
SPILLS = 100
"""Instructions of a warp and a group that move registers to memory and back."""
WIDE_PART = 64
SMALLEST_FITTED = 64
"""Tokens of a tile that is cut by them before it is cut otherwise."""
LEAST_STAGES = 2
"""With one nothing is ordered ahead: the kernel would wait for bytes that nobody asked for."""
LEAST_COLUMNS = 32
LEAST_OUTPUTS = 64
WARP_OUTPUTS = 16
LEAST_TOKENS = 16
MOST_SMALL = 64
"""Tokens of one small tile."""
SMALL_TILES = ((128, 4, 2), (64, 4, 4), (64, 4, 3), (128, 8, 2), (128, 8, 1), (256, 8, 1))
"""Outputs, warps and programs on a multiprocessor."""
NARROW = 1.2
"""Unverified: what products of fewer tokens than 64 lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """What a launch with scales in groups is chosen by."""

    field_bits: tuple[int, ...]
    slice_bytes: int
    group_slices: int
    m: int
    n: int
    """NP."""

    @property
    def least_turn(self) -> int:
        """Slices that hold whole runs and whole groups."""
        return max(turn_slices(self.field_bits), self.group_slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """Tile and launch parameters of one launch."""

    block_m: int
    """16 to 256 tokens, a power of two."""
    block_n: int
    """64, 128 or 256 outputs, 16 or more a warp."""
    block_k: int
    """Columns of one product, 32, 64 or 128; a stored slice is cut to it, with groups it is one."""
    stages: int
    num_warps: int = 8
    group_m: int = 8
    """Tiles of tokens walked before the next tile of weights."""
    programs: int = PROCESSORS
    """One for each multiprocessor, or a multiple where registers and shared memory allow it."""
    part_m: int = 64
    """With groups: tokens of a piece, 32, 64 or 128. Two pieces or four need fewest registers."""
    turn: int = 0
    """With groups: slices of an order, 2, 4 or 8; as few as hold whole runs and groups where this
    is less."""
    round_slices: int = 8
    """With groups: slices of one turn of the loop; few take fewer registers, many idle less. One
    group where it is as many; an order where it is less than one."""
    staged: bool = False
    """Without groups: results leave through shared memory by one copy, behind the next products."""
    pdl: bool = False
    """Without groups: start before the kernel that writes the tokens has ended."""
    subnormal: bool = True
    """With groups: read sums as subnormal floats, an instruction less for each."""
    convert: bool = False
    """With groups: convert sums by the instruction for it instead."""

    def shared_bytes(self, field_bits: tuple[int, ...], turn: int | None = None) -> int:
        """Shared memory of the stages, for orders of so many slices."""
        turn = turn_slices(field_bits) if turn is None else turn
        runs = sum(field_bits) * turn // 8
        return self.stages * self.block_k * (runs * self.block_n + turn * self.block_m)

    def result_bytes(self) -> int:
        """Shared memory that results pass through."""
        tile = 2 * self.block_m * self.block_n
        return tile + TERMS_BYTES if self.staged else min(SCRATCH_BYTES, 2 * tile + TERMS_BYTES)

    def scratch_bytes(self, *, grouped: bool, wide: bool) -> int:
        """Shared memory beside the stages, at most.

        Args:
            grouped: whether scales belong to groups.
            wide: whether results are float32.
        """
        scratch = GROUP_SCRATCH_BYTES if grouped else self.result_bytes()
        return max(scratch, WIDE_SCRATCH_BYTES * self.num_warps) if wide else scratch

    def check_stages(self) -> None:
        """Refuse what would wait forever.

        Raises:
            ValueError: if there are fewer than two stages.
        """
        if self.stages < LEAST_STAGES:
            raise ValueError(f"{self.stages} stages order no bytes ahead, {LEAST_STAGES} do")

    def turn_slices(self, field_bits: tuple[int, ...], group_slices: int) -> int:
        """Slices of an order with groups of so many slices."""
        return max(turn_slices(field_bits), group_slices, self.turn)

    def fitted(
        self,
        field_bits: tuple[int, ...],
        slice_bytes: int,
        group_slices: int = 0,
        *,
        wide: bool = False,
    ) -> "PrefillConfig":
        """Hold products to a stored slice and stages to what shared memory has.

        A table may have the launch of a neighbour whose slices are wider or whose codes take fewer
        slices in a turn. Where two stages have no room, the tile is cut until they have, see
        `_smaller`.

        Args:
            field_bits: of the weight.
            slice_bytes: of the weight.
            group_slices: slices of a group, 0 with one scale a row.
            wide: whether results are float32.

        Raises:
            ValueError: if not even the smallest tile has room for two stages.
        """
        return _fit(self, field_bits, slice_bytes, group_slices, wide)


@lru_cache(maxsize=1024)
def _fit(
    config: PrefillConfig,
    field_bits: tuple[int, ...],
    slice_bytes: int,
    group_slices: int,
    wide: bool,  # noqa: FBT001  a cache keys on places
) -> PrefillConfig:
    grouped = group_slices > 0
    block_k = slice_bytes if grouped else min(config.block_k, slice_bytes)
    staged = config.staged and not grouped and not wide
    one = replace(config, block_k=block_k, staged=staged)
    while (most := _most_stages(one, field_bits, group_slices, wide=wide)) < LEAST_STAGES:
        one = _smaller(one, grouped=grouped)
    return replace(one, stages=max(LEAST_STAGES, min(config.stages, most)))


def _most_stages(
    config: PrefillConfig, field_bits: tuple[int, ...], group_slices: int, *, wide: bool
) -> int:
    """Stages that the share of a program in shared memory holds beside its results."""
    turn = config.turn_slices(field_bits, group_slices) if group_slices else None
    share = SHARED_BYTES // max(1, config.programs // PROCESSORS)
    room = share - config.scratch_bytes(grouped=group_slices > 0, wide=wide)
    return room // replace(config, stages=1).shared_bytes(field_bits, turn)


def _smaller(config: PrefillConfig, *, grouped: bool) -> PrefillConfig:
    """Cut a launch: many tokens first, then columns, then outputs, then programs side by side."""
    cut: dict[str, Any]
    if config.block_m > SMALLEST_FITTED and config.staged:
        cut = {"staged": False}
    elif config.block_m > SMALLEST_FITTED:
        fewer = config.block_m // 2
        cut = {"block_m": fewer, "part_m": min(config.part_m, fewer)}
    elif not grouped and config.block_k > LEAST_COLUMNS:
        cut = {"block_k": config.block_k // 2}
    elif grouped and config.turn:
        cut = {"turn": 0}
    elif config.block_n > max(LEAST_OUTPUTS, WARP_OUTPUTS * config.num_warps):
        cut = {"block_n": config.block_n // 2}
    elif config.programs >= 2 * PROCESSORS:
        cut = {"programs": config.programs - PROCESSORS}
    else:
        raise ValueError(f"shared memory has no room for {LEAST_STAGES} stages of {config}")
    return replace(config, **cut)


def select_prefill_config(field_bits: tuple[int, ...], slice_bytes: int, m: int) -> PrefillConfig:
    """Pick the first of `prefill_configs`; a launch has no time to make them all."""
    return _first(field_bits, slice_bytes, min(max(1, m), MOST_SMALL + 1))


@lru_cache(maxsize=256)
def _first(field_bits: tuple[int, ...], slice_bytes: int, m: int) -> PrefillConfig:
    return prefill_configs(field_bits, slice_bytes, m)[0]


@lru_cache(maxsize=256)
def select_group_config(shape: GroupShape) -> PrefillConfig:
    """Pick the first of `group_configs`, likewise."""
    return group_configs(shape)[0]


def prefill_configs(
    field_bits: tuple[int, ...], slice_bytes: int, m: int = MOST_SMALL + 1
) -> list[PrefillConfig]:
    """Launches worth timing for a width, best guess first.

    One stage too few shows as waiting for bytes; wide products mean fewer turns.

    Args:
        field_bits: of the weight.
        slice_bytes: of the weight.
        m: tokens; up to 64, several small programs share a multiprocessor.
    """
    shapes = [(128, 256, 8, 1), (256, 128, 8, 1), (128, 128, 8, 1), (64, 256, 8, 1)]
    if m <= MOST_SMALL:
        block_m = max(LEAST_TOKENS, 1 << (m - 1).bit_length())
        # bytes, not products, take the time: more programs have more of them on their way, and
        # smaller tiles are spread more evenly
        shapes = [(block_m, n, warps, programs) for n, warps, programs in SMALL_TILES]
    wanted = [
        PrefillConfig(
            block_m=block_m, block_n=block_n, block_k=block_k, stages=0, num_warps=num_warps,
            programs=resident * PROCESSORS, staged=staged, pdl=staged,
        )
        for block_m, block_n, num_warps, resident in shapes
        for staged in (True, False)
        for block_k in (128, 64, 32)
        if block_k <= slice_bytes
    ]  # fmt: skip
    deepest = 6 if m <= MOST_SMALL else 4
    found = [each for each in (_deepened(one, field_bits, deepest) for one in wanted) if each]
    # a stage that waits for the one before hides nothing
    return sorted(found, key=lambda each: (shapes.index(_shape_of(each)), each.stages < 3))


def _shape_of(config: PrefillConfig) -> tuple[int, int, int, int]:
    resident = config.programs // PROCESSORS
    return config.block_m, config.block_n, config.num_warps, resident


def _deepened(
    config: PrefillConfig, field_bits: tuple[int, ...], deepest: int
) -> PrefillConfig | None:
    """Give a launch as many stages as its share of shared memory holds, None below two."""
    room = SHARED_BYTES * PROCESSORS // config.programs - config.result_bytes()
    stage = replace(config, stages=1).shared_bytes(field_bits)
    stages = min(deepest, room // stage)
    return replace(config, stages=stages) if stages > 1 else None


def group_configs(shape: GroupShape) -> list[PrefillConfig]:
    """Launches worth timing with scales in groups, best guess first."""
    # tokens, outputs, tokens of a piece, slices of a round: long rounds spill in large tiles
    tiles = [(256, 128, 64, 0), (128, 256, 32, 0), (128, 128, 64, 8), (64, 128, 64, 8)]
    found = []
    for block_m, block_n, part_m, round_slices in tiles:
        if block_m >= 2 * max(shape.m, 64):
            continue
        for turn in sorted({shape.least_turn, max(4, shape.least_turn)}):
            for stages in (4, 3, 2):
                config = PrefillConfig(
                    block_m=block_m, block_n=block_n, block_k=shape.slice_bytes, stages=stages,
                    part_m=part_m, turn=turn, round_slices=round_slices,
                )  # fmt: skip
                shared = config.shared_bytes(shape.field_bits, turn)
                if shared + GROUP_SCRATCH_BYTES <= SHARED_BYTES:
                    found.append(config)
                    break
    found.sort(key=lambda each: (_spills(each, shape), _predicted_clocks(each, shape)))
    plain = [replace(config, subnormal=False) for config in found[:1]]
    converted = [replace(config, convert=True) for config in found[:2]]
    if shape.least_turn > shape.group_slices:
        # one group a round holds the sums of the widest tile without spills
        wide = [config for config in found if config.block_m * config.block_n > ROOMY_OUTPUTS]
        converted += [
            replace(config, convert=True, round_slices=shape.group_slices) for config in wide[:1]
        ]
    return [*found, *plain, *converted, *_paired_programs(shape)]


def _paired_programs(shape: GroupShape) -> list[PrefillConfig]:
    """Launches of two programs of four warps on a multiprocessor.

    A warp that multiplies codes from its registers waits until the tensor cores take them; where
    all warps meet every turn, they wait together and scale together. Programs do not meet.
    """
    wide = PrefillConfig(
        block_m=128, block_n=128, block_k=shape.slice_bytes, stages=4, num_warps=4,
        programs=2 * PROCESSORS, turn=shape.least_turn, round_slices=shape.group_slices,
        convert=True,
    )  # fmt: skip
    for one in (wide, replace(wide, block_m=SMALLEST_FITTED)):
        stages = _most_stages(one, shape.field_bits, shape.group_slices, wide=False)
        if stages >= LEAST_STAGES:
            return _paired_ways(replace(one, stages=min(one.stages, stages)), shape.m)
    return []


def _paired_ways(one: PrefillConfig, m: int) -> list[PrefillConfig]:
    if one.block_m >= 2 * max(m, 64):
        return []
    return [one, replace(one, part_m=32), replace(one, convert=False, subnormal=False)]


def _spills(config: PrefillConfig, shape: GroupShape) -> bool:
    """Whether several groups in one turn of the loop ask for more registers than there are."""
    groups_a_round = max(config.turn, config.round_slices) // shape.group_slices
    return config.block_m * config.block_n > ROOMY_OUTPUTS and groups_a_round > 1


def _predicted_clocks(config: PrefillConfig, shape: GroupShape) -> float:
    """Clocks of the busiest multiprocessor for one group of all of its tiles."""
    tiles = -(-shape.m // config.block_m) * -(-shape.n // config.block_n)
    group, outputs = shape.group_slices * config.block_k, config.block_m * config.block_n
    groups_a_round = max(config.turn, config.round_slices) / shape.group_slices
    tensor = outputs * group / PRODUCTS_A_CLOCK + IDLE_CLOCKS / groups_a_round
    pieces = outputs / (16 * config.num_warps * config.part_m)
    unpacking = 3.5 + 2 * (len(shape.field_bits) - 1)
    bookkeeping = BOOKKEEPING * pieces + ORDERING * shape.group_slices / config.turn
    if _spills(config, shape):
        bookkeeping += SPILLS
    instructions = (
        (2 if config.subnormal else 3) * outputs
        + config.block_n * group / 4 * unpacking
        + 32 * config.num_warps * bookkeeping
    ) / LANES
    through_l2 = group * (config.block_m + sum(shape.field_bits) * config.block_n / 8)
    narrow = NARROW if config.part_m < WIDE_PART else 1.0
    busy = max(tensor, instructions, through_l2 / L2_BYTES_A_CLOCK)
    return -(-tiles // config.programs) * busy * narrow
