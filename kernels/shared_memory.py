"""Shared memory that a launch asks for: what a GPU has, and what a loop of Triton's compiler takes.

A turn of the loops of `kernels.tile_linear` and `kernels.half_linear` takes whole runs of fields:

    slices  t = 8 / f, f bits of the narrowest field        runs  r = p t / 8, p bits of a code
    bytes     = X t BM BK e + W r BN BK                     e bytes of an activation

where X and W are the copies that lie in shared memory at a time. Tensor cores that run on by
themselves read an operand where it lies, which takes S copies for S stages. What goes through
registers takes one copy less: fields of codes, and all operands of warps that multiply alone.
Compiled for sm_90 the kernels ask for exactly this, or for what their results pass through where
that is more.

Shape legend: BM tokens, BN outputs and BK columns of a tile.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeVar

import torch
import triton

__all__ = [
    "SHARED_BYTES", "LoopConfig", "LoopOperands", "fit_loop", "loop_bytes", "room_of",
    "turn_slices",
]  # fmt: skip

SHARED_BYTES = 227 * 1024
"""Of an H100; one program may use them all. An A100 has 163 KiB, an RTX 4090 99."""
LEAST_STAGES = 2
"""With one, a turn begins to read when the one before has ended."""
LEAST_COLUMNS = 32
LEAST_TOKENS = 8
JOINT_OUTPUTS = 64
JOINT_WARPS = 4
"""Multiply together on Hopper, from so many outputs on."""
BYTE_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOperands:
    """What a loop multiplies."""

    field_bits: tuple[int, ...]
    """Of the weight, the widest first."""
    slice_bytes: int
    """Of the weight."""
    grouped: bool
    """Whether scales belong to groups, which take whole slices."""
    token_bytes: int
    """Of an activation: 1 or 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """Tile and launch parameters of a kernel with such a loop."""

    token_bytes: ClassVar[int]
    """Of an activation that the kernel multiplies."""

    block_m: int
    """Tokens, 8 or more."""
    block_n: int
    """Outputs, 32 to 256."""
    block_k: int
    """Columns of one product, 32..128; a stored slice is cut to it."""
    num_warps: int
    num_stages: int
    splits: int = 1
    """Programs that share the K of one tile."""

    def fitted(
        self,
        field_bits: tuple[int, ...],
        slice_bytes: int,
        *,
        grouped: bool,
        room: int = SHARED_BYTES,
    ) -> Self:
        """Hold the launch to a stored slice and to shared memory, see `fit_loop`.

        Args:
            field_bits: of the weight.
            slice_bytes: of the weight; a scale group takes whole ones.
            grouped: whether scales belong to groups.
            room: bytes of shared memory, see `room_of`.
        """
        operands = LoopOperands(
            field_bits=field_bits,
            slice_bytes=slice_bytes,
            grouped=grouped,
            token_bytes=self.token_bytes,
        )
        return fit_loop(self, operands, room)


Config = TypeVar("Config", bound=LoopConfig)


def room_of(device: torch.device) -> int:
    """Bytes that one program may use: on a GPU what the driver says, else those of an H100."""
    return _room_of(device.index or 0) if device.type == "cuda" else SHARED_BYTES


@lru_cache(maxsize=16)
def _room_of(device_index: int) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(device_index)
    return int(properties["max_shared_mem"])


def turn_slices(field_bits: tuple[int, ...]) -> int:
    """Slices that hold whole runs of every field."""
    return BYTE_BITS // field_bits[-1]


def loop_bytes(config: LoopConfig, operands: LoopOperands) -> int:
    """Shared memory of all stages, by the formula at the head of this module."""
    turn = turn_slices(operands.field_bits)
    runs = sum(operands.field_bits) * turn // BYTE_BITS
    joint = config.block_n >= JOINT_OUTPUTS and config.num_warps % JOINT_WARPS == 0
    # signed bytes are codes as they are stored: 8-bit products read them where they lie
    stored = joint and operands.field_bits[0] == BYTE_BITS and operands.token_bytes == 1
    through = max(1, config.num_stages - 1)
    tokens = turn * config.block_m * operands.token_bytes
    weights = runs * config.block_n
    copies = (config.num_stages if joint else through) * tokens
    copies += (config.num_stages if stored else through) * weights
    return config.block_k * copies


def fit_loop(config: Config, operands: LoopOperands, room: int = SHARED_BYTES) -> Config:
    """Hold a launch to a stored slice and to shared memory; one that fits stays as it is.

    It loses stages down to two, then columns of a product, then tokens of a tile. A table may have
    the launch of a neighbour whose codes are wider and yet take fewer slices in a turn: 4 bits take
    two, 3 bits take eight.

    Args:
        config: of a tile of at least 8 tokens.
        operands: of the loop.
        room: bytes of shared memory, see `room_of`.
    """
    fitted: Config = _fit(config, operands, room)
    return fitted


@lru_cache(maxsize=4096)
def _fit(config: Any, operands: LoopOperands, room: int) -> Any:
    """The same without the type, which a cache does not keep."""
    width = operands.slice_bytes
    one = replace(config, block_k=width if operands.grouped else min(config.block_k, width))
    while not (fitting := _fitting(one, operands, room)):
        if not operands.grouped and one.block_k > LEAST_COLUMNS:
            one = replace(one, block_k=one.block_k // 2)
        elif one.block_m > LEAST_TOKENS:
            one = replace(one, block_m=one.block_m // 2)
        else:
            # no weight of `kernels.sliced` comes here; the compiler says what is missing
            return replace(one, num_stages=1)
    return fitting[0]


def _fitting(config: Config, operands: LoopOperands, room: int) -> list[Config]:
    """The launch with as many stages as it has, or fewer down to two, where they fit."""
    most = config.num_stages
    deep = [replace(config, num_stages=n) for n in range(most, min(most, LEAST_STAGES) - 1, -1)]
    return [one for one in deep if loop_bytes(one, operands) <= room]
