"""Products of a few tokens of 16 bits and sliced weights, on tensor cores fed from registers.

    Y[m,n] = sum_g s_w[n,g] (c D[m,n,g] - z[n,g] R[m,g]) + bias[n]                       float32
    D[m,n,g] = sum_{k in g} x[m,k] u_w[n,k]            R[m,g] = sum_{k in g} x[m,k]

u are unsigned codes and z their zero-points on the grid of c u, c the multiplier of the weight. No
weight is rounded: masked bits of a word are a float16 as they stand, field 2^at 2^-24, subnormal
and exact; a bfloat16 is made of them by two instructions, 128 + field less 128. Two bytes of a
word, two columns apart, are the halves of one register, and the tokens' columns are put into that
order. A product of 16 rows takes 16 columns of 8 tokens at once, so that 1 to 8 tokens cost alike;
R is such a product by ones. One launch does it all, from activations as they lie in memory.

How exact it is: products of 11 and 8 bits are exact in float32. A tensor core adds 16 of them to
its sum with one unit of 2^-23 of the largest lost for each at most, and a chain is C = L / (64
WARPS) such steps, so what is lost is below

    17 C 2^-23 (c u_max + |z|) s_w sum |x|        with C = 8 at L = 4096 and 8 warps, 2^-16

of what sum |x| could reach. Rounding every weight to 16 bits could lose 2^-11 (float16) or 2^-8
(bfloat16, cut) of it.

Shape legend: M tokens, N outputs, K inputs, L columns with padding, S groups, G bytes of a slice;
a step is 512 columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
import triton

from kernels._half_decode_kernel import half_decode_kernel
from kernels.overlap import can_overlap
from kernels.sliced import SlicedWeight, field_widths

__all__ = [
    "MAX_TOKENS",
    "HalfDecodeConfig",
    "HalfDecodeShape",
    "can_group",
    "can_half_decode",
    "half_decode",
    "half_decode_configs",
]

MAX_TOKENS = 8
STEP = 512
TILE_ROWS = 16
BYTE_BITS = 8
GROUPS_A_BLOCK = 4
SLICES = 8
ALIGNMENT = 16
WARP = 32
PROCESSORS = 132
CYCLES_PER_US = 1755
MEMORY_BYTES_PER_US = 3.0e6
BYTES_IN_FLIGHT = 32 << 10
REGISTERS = 1 << 16
MAX_REGISTERS = 232
FEWER_REGISTERS = (128, 96, 80)
MAX_WARPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfDecodeConfig:
    """Tile and launch parameters of one kernel launch."""

    row_tiles: int
    """1, 2 or 4 tiles of 16 outputs, which share the activations of a lane."""
    warps: int
    """Warps that share the steps of K."""
    steps: int
    """Steps that a warp reads at a time; best all of them."""
    launch_pdl: bool = True
    """Start while the kernel before still runs: weights are read at once, tokens when it ends."""
    max_registers: int | None = None
    """Registers of a thread; None leaves them to the compiler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfDecodeShape:
    """What a launch depends on."""

    bits: int
    n: int
    columns: int
    """L."""
    is_half: bool = False
    """Whether activations are float16; bfloat16 else."""
    grouped: bool = False

    @property
    def steps(self) -> int:
        """Steps of the whole K."""
        return -(-self.columns // STEP)


def half_decode_configs(shape: HalfDecodeShape, limit: int = 24) -> list[HalfDecodeConfig]:
    """List launches worth timing, best guess first, by arithmetic alone.

    An H100 showed that loads are waited for with three warps on a scheduler: fewer registers give
    it more, so the best guesses are listed with those too.

    Args:
        shape: the product.
        limit: how many at most; the last is the first without dependent launch.
    """
    ranked = sorted(dict.fromkeys(_fitting(shape)), key=lambda one: _microseconds(one, shape))
    held = [replace(one, max_registers=most) for most in FEWER_REGISTERS for one in ranked[:3]]
    return [*ranked[: limit - 1 - len(held)], *held, replace(ranked[0], launch_pdl=False)]


def can_half_decode(x: torch.Tensor, weight: SlicedWeight) -> bool:
    """Whether this kernel multiplies these operands; `half_linear` multiplies all.

    It does unless there are more than 8 tokens, rows of ``x`` that are not 16-byte aligned, K that
    is no multiple of 16, or groups of which a block of 8G columns does not hold four.
    """
    m, k = x.shape
    aligned = x.data_ptr() % ALIGNMENT == 0 and (m == 1 or x.stride(0) % BYTE_BITS == 0)
    whole = weight.groups == 1 or (
        can_group(weight.groups, weight.group_size, weight.slice_bytes)
        and weight.multiplier == 1
        and weight.scale.dtype is torch.float16
    )
    return m <= MAX_TOKENS and aligned and k % TILE_ROWS == 0 and whole


def can_group(groups: int, group_size: int, slice_bytes: int) -> bool:
    """Whether blocks of 8 slices hold four groups each, which a lane reads at once."""
    block = SLICES * slice_bytes
    return block == GROUPS_A_BLOCK * group_size and block >= STEP and groups % GROUPS_A_BLOCK == 0


def half_decode(
    x: torch.Tensor,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    config: HalfDecodeConfig | None = None,
) -> torch.Tensor:
    """Multiply up to 8 tokens by a sliced weight on a GPU from Ampere on.

    Args:
        x: float16 or bfloat16 ``[M, K]``, rows contiguous.
        weight: N outputs of K codes.
        bias: float ``[N]`` or None.
        config: the launch; None takes the first of `half_decode_configs`.

    Returns:
        ``[M, N]`` in the dtype of ``x``, the same in every run.

    Raises:
        ValueError: if the operands are none for this kernel (see `can_half_decode`), or the launch.
    """
    shape = HalfDecodeShape(
        bits=weight.bits,
        n=weight.out_features,
        columns=weight.columns,
        is_half=x.dtype is torch.float16,
        grouped=weight.groups > 1,
    )
    config = config or _best(shape)
    _check(x, weight, config)
    out = x.new_empty((x.shape[0], weight.out_features))
    if len(x):
        _launch(x, weight, bias, out, config)
    return out


def _launch(
    x: torch.Tensor,
    weight: SlicedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: HalfDecodeConfig,
) -> None:
    (m, n), g = out.shape, weight.slice_bytes
    grouped = weight.groups > 1
    fields = [field.view(torch.int32) for field in weight.fields]
    fields += fields[:1] * (3 - len(fields))
    field_bits = (*weight.field_bits, 0, 0)
    if m == 1:
        # no row follows: what its stride says need not be whole words
        x = x.as_strided(x.shape, (x.shape[1], 1))
    pdl = config.launch_pdl and x.is_cuda and can_overlap(x.device.index)
    half_decode_kernel[(triton.cdiv(n, TILE_ROWS * config.row_tiles),)](
        x.view(torch.int64), x.stride(0) // 4,
        *fields, weight.padded_rows * (g // 4),
        weight.scale.view(torch.int64) if grouped else weight.scale,
        weight.zero_point,
        weight.zero_codes.view(torch.int32) if grouped else weight.zero_codes,
        bias if bias is not None else out,
        out, out.stride(0),
        m, n, weight.in_features,
        F0=field_bits[0],
        F1=field_bits[1],
        F2=field_bits[2],
        MULTIPLIER=weight.multiplier,
        GROUPS=weight.groups,
        HAS_BIAS=bias is not None,
        IS_HALF=x.dtype is torch.float16,
        BLOCK_ROWS=weight.block_rows,
        G=g,
        COLUMNS=weight.columns,
        EVEN_K=weight.in_features == weight.columns,
        ROW_TILES=config.row_tiles,
        WARPS=config.warps,
        STEPS=config.steps,
        PDL=pdl,
        num_warps=config.warps,
        maxnreg=config.max_registers,
        # products are rounded before sums
        enable_fp_fusion=False,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _best(shape: HalfDecodeShape) -> HalfDecodeConfig:
    return half_decode_configs(shape)[0]


def _fitting(shape: HalfDecodeShape) -> Iterator[HalfDecodeConfig]:
    """Launches that registers suffice for and in which no warp is idle, or one that does work."""
    for tiles, warps, steps in product((1, 2, 4), (1, 2, 4, 8, 16), (1, 2, 3, 4)):
        config = HalfDecodeConfig(row_tiles=tiles, warps=warps, steps=steps)
        busy = warps * (steps - 1) < shape.steps and warps <= shape.steps
        # what is read ahead of a turn holds registers enough
        busy &= steps == 1 or _turns(config, shape) == 1
        if busy and _registers(config, shape) <= min(MAX_REGISTERS, REGISTERS // (WARP * warps)):
            yield config
    yield HalfDecodeConfig(row_tiles=1, warps=min(4, 1 << (shape.steps.bit_length() - 1)), steps=1)


def _turns(config: HalfDecodeConfig, shape: HalfDecodeShape) -> int:
    return -(-shape.steps // (config.warps * config.steps))


def _registers(config: HalfDecodeConfig, shape: HalfDecodeShape) -> int:
    """Estimate the registers of a thread, as read from compiled kernels."""
    held = 8 * config.row_tiles * shape.bits * config.steps
    sums = 16 * config.row_tiles * len(field_widths(shape.bits)) + 16
    # the compiler fetches the tokens of whole steps ahead
    ahead = 96 * config.steps - 40 if shape.grouped else 40 + 16 * config.steps
    again = _turns(config, shape) > 1
    return ahead + (2 * held + 48 if again else held) + sums


def _issued(config: HalfDecodeConfig, shape: HalfDecodeShape) -> float:
    """Instructions of a warp, as counted in compiled kernels."""
    tiles = config.row_tiles
    products = 2 if shape.bits == BYTE_BITS and not shape.is_half else len(field_widths(shape.bits))
    step = 32 * products * tiles * (5 if shape.is_half else 9)
    step += 8 * tiles * shape.bits * (1 if shape.is_half else 3)
    step += 32 * 3 + 16 + 2 * tiles * shape.bits
    step += 4 * 40 * tiles if shape.grouped else 0
    return 150 + 30 * tiles + _turns(config, shape) * config.steps * step


def _microseconds(config: HalfDecodeConfig, shape: HalfDecodeShape) -> float:
    """Estimate a launch: the slower of memory and issue, then its ends."""
    programs = -(-shape.n // (TILE_ROWS * config.row_tiles))
    # programs are spread evenly at best
    most = -(-programs // PROCESSORS)
    uneven = 0.5 + 0.5 * most * PROCESSORS / programs
    padding = _turns(config, shape) * config.warps * config.steps / shape.steps
    threads = WARP * config.warps
    resident = min(
        most, MAX_WARPS // config.warps, REGISTERS // (threads * _registers(config, shape))
    )
    flying = resident * threads * 32 * config.row_tiles * shape.bits * config.steps
    held = min(1.0, flying / BYTES_IN_FLIGHT)
    read = shape.n * shape.columns * shape.bits / 8
    memory = read / MEMORY_BYTES_PER_US * uneven / (0.4 + 0.6 * held)
    issue = _issued(config, shape)
    issued = programs / PROCESSORS * uneven * config.warps * issue / 4 / CYCLES_PER_US
    # the last program of a processor computes alone, about every other cycle
    alone = issue * 2 / CYCLES_PER_US
    return (
        max(memory, issued * max(1.0, 0.5 + 0.5 * padding))
        + 0.15 * issued
        + alone
        + 0.02 * config.warps
    )


def _check(x: torch.Tensor, weight: SlicedWeight, config: HalfDecodeConfig) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations must be float16 or bfloat16, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.stride(1) != 1:
        raise ValueError(
            f"activations {tuple(x.shape)} of strides {x.stride()} do not fit"
            f" K = {weight.in_features}"
        )
    if x.device != weight.scale.device:
        raise ValueError(f"activations are on {x.device}, weights on {weight.scale.device}")
    if not can_half_decode(x, weight):
        raise ValueError(
            f"activations {tuple(x.shape)} or groups of {weight.group_size} columns in slices of"
            f" {weight.slice_bytes} bytes are none for this kernel; half_linear takes them"
        )
    if weight.block_rows % (TILE_ROWS * config.row_tiles):
        raise ValueError(
            f"{config.row_tiles} row tiles do not divide a block of {weight.block_rows} rows"
        )
