"""Rotary positions on the query and key heads of packed projections, in place.

    a = x[..., :R/2]        b = x[..., R/2:R]                       of every head
    x[..., :R/2] = round(round(a cos) - round(b sin))
    x[..., R/2:R] = round(round(b cos) + round(a sin))

`cos` and `sin` are rows of a table in float32, rounded to the dtype of x as a model does before it
multiplies; `round` goes to that dtype too. Whatever scales the frequencies is in the table.
Channels beyond R, and the value heads behind the keys, are not touched.

Shape legend: M tokens, P positions, F features of a packed row, D dimensions of a head, R rotated.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["LaunchConfig", "RotaryTable", "rotate", "rotate_reference", "select_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryTable:
    """The turn of every position."""

    cos: torch.Tensor
    """float32 ``[P, R / 2]``, contiguous."""
    sin: torch.Tensor
    """float32 ``[P, R / 2]``, contiguous."""

    @classmethod
    def of_frequencies(
        cls, inverse_frequencies: torch.Tensor, positions: int, scaling: float = 1.0
    ) -> Self:
        """Tabulate the turns of the first positions.

        Args:
            inverse_frequencies: float32 ``[R / 2]``, scaled where the model scales them.
            positions: P.
            scaling: what the model multiplies cosines and sines by.
        """
        steps = torch.arange(positions, device=inverse_frequencies.device, dtype=torch.float32)
        angles = torch.outer(steps, inverse_frequencies.float())
        return cls(cos=angles.cos() * scaling, sin=angles.sin() * scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Launch parameters."""

    heads: int
    """Heads a program turns, a power of two."""
    num_warps: int
    launch_pdl: bool = False
    """Start while the kernel before still runs (programmatic dependent launch)."""


def select_config(m: int, heads: int) -> LaunchConfig:
    """Pick the launch for M tokens of query and key heads together: not measured.

    Few tokens spread over many programs; many tokens take more heads a program.
    """
    wanted = 4 if m * heads <= 4096 else 16
    return LaunchConfig(heads=min(wanted, triton.next_power_of_2(heads)), num_warps=4)


def rotate(
    x_MF: torch.Tensor,
    positions: torch.Tensor,
    table: RotaryTable,
    *,
    heads: int,
    head_dim: int,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Turn the first heads of every token by its position, in place.

    Args:
        x_MF: float16, bfloat16 or float32 ``[M, F]``, features contiguous: query heads, key heads
            and whatever follows.
        positions: int32 or int64 ``[M]``, below P.
        table: the turns.
        heads: query and key heads together.
        head_dim: D, at least R.
        config: None takes `select_config`.

    Returns:
        `x_MF` itself.

    Raises:
        ValueError: if heads, positions and table do not fit the rows.
    """
    _check(x_MF, positions, table, heads, head_dim)
    m, half = len(x_MF), table.cos.shape[1]
    if not m:
        return x_MF
    config = config or select_config(m, heads)
    interpreted = not x_MF.is_cuda
    _rotary_kernel[(m, triton.cdiv(heads, config.heads))](
        x_MF, x_MF.stride(0),
        positions,
        table.cos, table.sin,
        heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_H=config.heads,
        BLOCK_R=triton.next_power_of_2(half),
        PDL=config.launch_pdl and not interpreted,
        INTERP=interpreted,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if config.launch_pdl else {}),
    )  # fmt: skip
    return x_MF


def rotate_reference(
    x_MF: torch.Tensor, positions: torch.Tensor, table: RotaryTable, *, heads: int, head_dim: int
) -> torch.Tensor:
    """Compute `rotate` in plain torch on any device; the input is left alone."""
    dtype, half = x_MF.dtype, table.cos.shape[1]
    out_MF = x_MF.clone()
    turned = out_MF[:, : heads * head_dim].view(len(x_MF), heads, head_dim)
    cos, sin = (each[positions.long()].to(dtype)[:, None] for each in (table.cos, table.sin))
    a, b = turned[..., :half].clone(), turned[..., half : 2 * half].clone()
    turned[..., :half] = a * cos - b * sin
    turned[..., half : 2 * half] = b * cos + a * sin
    return out_MF


@triton.jit
def _rotary_kernel(
    x_ptr, stride_xm,
    positions_ptr,
    cos_ptr, sin_ptr,
    HEADS,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program turns BLOCK_H heads of one token: two tiles ``[BLOCK_H, BLOCK_R]``."""
    dtype = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < HALF
    mask = (offs_h < HEADS)[:, None] & mask_r[None, :]
    if PDL:
        gdc_launch_dependents()
    # with PDL the position may come from the kernel before
    if PDL:
        gdc_wait()
    position = tl.load(positions_ptr + row).to(tl.int64)
    a_ptrs = x_ptr + row * stride_xm + offs_h[:, None] * HEAD_DIM + offs_r[None, :]
    a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * HALF + offs_r, mask=mask_r, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + offs_r, mask=mask_r, other=0.0)
    cos = _rounded(cos, dtype, INTERP)[None, :]
    sin = _rounded(sin, dtype, INTERP)[None, :]
    first = _rounded(a * cos, dtype, INTERP) - _rounded(b * sin, dtype, INTERP)
    second = _rounded(b * cos, dtype, INTERP) + _rounded(a * sin, dtype, INTERP)
    tl.store(a_ptrs, _rounded(first, dtype, INTERP).to(dtype), mask=mask)
    tl.store(a_ptrs + HALF, _rounded(second, dtype, INTERP).to(dtype), mask=mask)


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERP: tl.constexpr):
    """float32 values that the model's dtype holds, half to even."""
    if INTERP and dtype == tl.bfloat16:
        # the interpreter cuts off what a GPU rounds
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


def _check(
    x: torch.Tensor, positions: torch.Tensor, table: RotaryTable, heads: int, head_dim: int
) -> None:
    rotated = 2 * table.cos.shape[1]
    if x.dim() != 2 or x.stride(1) != 1 or heads * head_dim > x.shape[1]:
        raise ValueError(
            f"{heads} heads of {head_dim} do not fit rows {tuple(x.shape)}, strides {x.stride()}"
        )
    if rotated > head_dim or table.sin.shape != table.cos.shape:
        raise ValueError(
            f"a table of {rotated} channels, sin {tuple(table.sin.shape)}, for heads of {head_dim}"
        )
    if positions.shape != (len(x),):
        raise ValueError(f"positions {tuple(positions.shape)} for {len(x)} tokens")
