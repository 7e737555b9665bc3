"""The integer linear layer on the binary tensor cores of Ampere to Hopper.

    S[m,n,g] = sum_{a,b} 2^(a+b) sum_{k in g} (bit a of u_w[n,k]) and (bit b of u_x[m,k])
    I[m,n,g] = c S - z_w[n,g] (R[m,g] - G z_x[m]) - c z_x[m] C[n,g]       int32, wraps harmlessly
    Y[m,n]   = s_x[m] (sum_g s_w[n,g] I[m,n,g]) + bias[n]                 float32, products rounded

c is 1, or 2 on half-step grids; R and C are sums of the codes of a token and of a row. Operands lie
in fragment order (`kernels.fragments`), one 128-bit load a lane and instruction, so that a layout
here fixes which lane holds what: that is why the file is Gluon and inline assembly is sound.

`bmma_decode` takes every bit of a token as a column and reads each weight once from memory.
`bmma_prefill` takes tokens as columns and stages both operands in shared memory. Its products of
one weight 2^s, s = a + b, must be shifted before they meet those of s + 1; instead of shifting each
product, the accumulator itself is rotated by one bit between levels: up in one chunk of K, down in
the next. Bits that leave at the bottom wait at the top, as S is below 2^32. Rows of an accumulator
take turns: while one is rotated, others are multiplied.

Shape legend: M tokens, N outputs, K inputs, G inputs in a group, S = K / G groups, P and Q bits,
T = ceil(N / 16) row tiles, J column tiles of 16, B = ceil(K / 256) steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton

from kernels._binary_linear_kernel import bmma_decode_kernel
from kernels._binary_prefill_kernel import bmma_prefill_kernel
from kernels.fragments import (
    TILE,
    ColumnOrder,
    FragmentTokens,
    FragmentWeight,
    columns_a_token,
    fragment_product,
)
from kernels.tokens import BYTE_BITS, BYTE_SHIFT

__all__ = [
    "LaunchConfig",
    "ProductShape",
    "binary_configs",
    "binary_linear",
    "binary_linear_reference",
    "select_config",
]

SMS = 132
COLUMN_TILES = 8
FRAGMENT_BYTES = 512
MOST_PLANES = 4
"""Of a chunk's tokens in registers: 16 a plane and step, beside 128 sums."""
SHARED_BYTES = 227 << 10
"""Of an H100; one CTA may use them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductShape:
    """What a launch is chosen by."""

    order: ColumnOrder
    m: int
    n: int
    k: int
    weight_bits: int
    token_bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Tile and launch parameters of one kernel launch."""

    row_tiles: int
    """Tiles of 16 outputs a CTA computes."""
    column_tiles: int
    """Tiles of 16 tokens a CTA computes; 0 in decode, where a CTA takes all."""
    warps_n: int
    """Warps that share the row tiles."""
    warps_other: int
    """Warps that share the tokens in prefill, the steps of K in decode."""
    steps: int
    """Steps of K: of a chunk in prefill, that a warp has in flight in decode."""
    stages: int = 1
    """Chunks in shared memory; unused in decode."""
    max_registers: int | None = None

    @property
    def num_warps(self) -> int:
        """Warps of a CTA."""
        return self.warps_n * self.warps_other


def select_config(
    shape: ProductShape, table: Mapping[ProductShape, LaunchConfig] | None = None
) -> LaunchConfig:
    """Pick the launch of a shape: from the table, else by reasoning on compiled code, untimed.

    Decode wants every weight of a CTA in flight at once, and a CTA for every SM; prefill a warp
    tile of 64 x 64, whose accumulators take 128 registers, and two chunks or more on their way.
    """
    if table and shape in table:
        return table[shape]
    tiles, steps = triton.cdiv(shape.n, TILE), triton.cdiv(shape.k, 256)
    if shape.order is ColumnOrder.TOKENS:
        chunk = max(1, MOST_PLANES // _planes_at_once(shape)) if _products(shape) <= 4 else 1
        # a turn of the loop multiplies as many chunks as there are stages: rather few than too many
        fitting = SHARED_BYTES // _chunk_bytes(shape, 16, chunk)
        stages = 4 if fitting >= 4 and steps % (4 * chunk) == 0 else 2
        return _prefill_config(16, warps_m=2, steps=chunk, stages=stages)
    columns = triton.cdiv(shape.m * columns_a_token(shape.token_bits), TILE)
    row_tiles = 2 if tiles >= 2 * SMS and columns * shape.weight_bits <= 8 else 1
    warps = min(8, triton.next_power_of_2(steps))
    ahead = max(1, 8 // (row_tiles * shape.weight_bits * columns))
    # a warp never has more steps in flight than it has at all
    ahead = min(ahead, triton.next_power_of_2(triton.cdiv(steps, warps)))
    return LaunchConfig(
        row_tiles=row_tiles, column_tiles=0, warps_n=1, warps_other=warps, steps=ahead
    )


def binary_configs(shape: ProductShape) -> list[LaunchConfig]:
    """List launches worth timing."""
    if shape.order is ColumnOrder.TOKENS:
        return [
            _prefill_config(row_tiles, warps_m=warps_m, steps=steps, stages=stages)
            for row_tiles, warps_m, ctas, chunks in (
                (16, 2, 1, (2, 4, 1)),
                (8, 2, 2, (2, 4, 1)),
                (16, 4, 1, (2,)),
            )
            for steps in chunks
            if steps == 1 or steps * _planes_at_once(shape) <= MOST_PLANES
            for stages in _stages(SHARED_BYTES // ctas // _chunk_bytes(shape, row_tiles, steps))
        ]
    return [
        LaunchConfig(
            row_tiles=rows * warps_n,
            column_tiles=0,
            warps_n=warps_n,
            warps_other=warps,
            steps=ahead,
        )
        for rows in (1, 2, 4)
        for warps_n in (1, 2)
        for warps in (4, 8, 16)
        for ahead in (1, 2, 4)
        if rows * ahead * max(shape.weight_bits, shape.m * shape.token_bits // 8) <= 16
        and warps * ahead < 2 * triton.cdiv(shape.k, 256)
        and warps_n * warps <= 16
    ]


def binary_linear(
    tokens: FragmentTokens,
    weight: FragmentWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Multiply fragments on a GPU: decode or prefill as the order of the tokens' columns tells.

    Args:
        tokens: M tokens of K columns or more, sums of the weight's groups.
        weight: N outputs; groups of 128 only with columns of `BITS`.
        bias: float32 ``[N]`` or None.
        out: float16, bfloat16 or float32 ``[M, N]``, rows contiguous; every element is written.
        config: None asks `select_config`.

    Returns:
        `out`.

    Raises:
        ValueError: if the operands do not fit each other, or `out`.
    """
    shape = _check_operands(tokens, weight, out)
    config = config or select_config(shape)
    codes = tokens.tokens
    width = columns_a_token(codes.bits)
    operands = (
        weight.planes, *weight.planes.stride()[:3],
        tokens.words, *tokens.words.stride()[:2],
        weight.scale, weight.zero_point, weight.sums,
        codes.scale, codes.zero_point, codes.sums,
        bias if bias is not None else out,
        out, out.stride(0),
        shape.m, shape.n, shape.k, *weight.planes.shape[:2],
    )  # fmt: skip
    constants = {
        "P": weight.bits,
        "SHIFT": BYTE_SHIFT if codes.bits == BYTE_BITS else 0,
        "MULTIPLIER": weight.multiplier,
        "HAS_BIAS": bias is not None,
        "ROW_TILES": config.row_tiles,
        "WARPS_N": config.warps_n,
        "STEPS": config.steps,
        "num_warps": config.num_warps,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": False,
    }
    rows = triton.cdiv(weight.planes.shape[0], config.row_tiles)
    column_tiles = tokens.words.shape[0]
    if not column_tiles:
        return out
    if tokens.order is ColumnOrder.TOKENS:
        bmma_prefill_kernel[(rows, triton.cdiv(column_tiles, config.column_tiles))](
            *operands, column_tiles,
            Q=codes.bits,
            COLUMN_TILES=config.column_tiles,
            WARPS_M=config.warps_other,
            STAGES=config.stages,
            **constants,
        )  # fmt: skip
        return out
    slots = config.steps * config.warps_other
    groups = weight.scale.shape[0]
    bmma_decode_kernel[(rows,)](
        *operands, column_tiles, groups,
        COLUMN_TILES=triton.next_power_of_2(column_tiles),
        HALVES=1 if shape.m * width <= TILE // 2 else 2,
        WIDTH=width,
        WARPS_K=config.warps_other,
        TURNS=triton.cdiv(weight.planes.shape[1], slots),
        GROUPED=groups > 1,
        **constants,
    )  # fmt: skip
    return out


def binary_linear_reference(
    tokens: FragmentTokens, weight: FragmentWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute float32 ``[M, N]`` of whole rows in plain torch, the product from the fragments."""
    codes, n = tokens.tokens, weight.out_features
    shift = BYTE_SHIFT if codes.bits == BYTE_BITS else 0
    z_x = codes.zero_point.long()[:, None] + shift
    r_x = codes.sums.long() + shift * weight.in_features
    z_w, sums = weight.zero_point[0, :n].long(), weight.sums[0, :n].long()
    product = weight.multiplier * fragment_product(tokens, weight)
    integer = product - z_w * (r_x - weight.in_features * z_x) - weight.multiplier * z_x * sums
    out_MN = integer.float() * weight.scale[0, :n].float() * codes.scale[:, None]
    return out_MN if bias is None else out_MN + bias


def _prefill_config(row_tiles: int, *, warps_m: int, steps: int, stages: int) -> LaunchConfig:
    """Tiles of 64 outputs a warp."""
    return LaunchConfig(
        row_tiles=row_tiles,
        column_tiles=COLUMN_TILES,
        warps_n=row_tiles // 4,
        warps_other=warps_m,
        steps=steps,
        stages=stages,
    )


def _stages(fitting: int) -> list[int]:
    """As many as fit, 4 at most, and 2, whose loop is the shortest."""
    return list(dict.fromkeys((min(4, fitting), 2))) if fitting >= 2 else []


def _products(shape: ProductShape) -> int:
    return shape.weight_bits * shape.token_bits


def _planes_at_once(shape: ProductShape) -> int:
    """Planes of tokens that a level needs at most."""
    return min(shape.weight_bits, shape.token_bits)


def _chunk_bytes(shape: ProductShape, row_tiles: int, steps: int) -> int:
    tiles = row_tiles * shape.weight_bits + COLUMN_TILES * shape.token_bits
    return steps * tiles * FRAGMENT_BYTES


def _check_operands(
    tokens: FragmentTokens, weight: FragmentWeight, out: torch.Tensor
) -> ProductShape:
    codes, groups = tokens.tokens, weight.scale.shape[0]
    m, n = codes.codes.shape[0], weight.out_features
    # tokens of a sliced weight are padded to its blocks, which may end a step behind its bits
    if tokens.words.shape[1] < weight.planes.shape[1]:
        raise ValueError(
            f"tokens of {tokens.words.shape[1]} steps do not fit K = {weight.in_features}"
        )
    if codes.sums.shape[1] != groups:
        raise ValueError(f"tokens have sums of {codes.sums.shape[1]} groups, the weight {groups}")
    if groups > 1 and tokens.order is ColumnOrder.TOKENS:
        raise ValueError(f"{groups} groups: columns of tokens multiply whole rows only")
    if out.shape != (m, n) or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is no contiguous [{m}, {n}]")
    return ProductShape(
        order=tokens.order,
        m=m,
        n=n,
        k=weight.in_features,
        weight_bits=weight.bits,
        token_bits=codes.bits,
    )
