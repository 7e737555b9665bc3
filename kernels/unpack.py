"""Sliced weights written out: int8 codes for integer products, 16 bits a weight for others.

    unpack_int8    byte j of run s of a block  =  code of k = kb 8G + s G + j
    unpack_half    W[n,k] = s_w[n,g] (c u_w[n,k] - z_w[n,g])                rounded once, to 16 bits

Both pay where many tokens share one pass over the weights.

Shape legend: N outputs (NP with padding), K inputs (L with padding), S groups, c the multiplier.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.field_codes import hold_run, join_fields
from kernels.sliced import SlicedWeight

__all__ = ["unpack_half", "unpack_half_reference", "unpack_int8"]

BYTE_BITS = 8


def unpack_int8(weight: SlicedWeight, scratch: torch.Tensor | None = None) -> SlicedWeight:
    """Give every code a byte, so that integer products need no unpacking.

    Args:
        weight: codes of 1..8 bits; those of 8 are returned as they are.
        scratch: uint8 ``[NP * L]`` or more to write to; None allocates.

    Returns:
        The same weight with one field of 8 bits, for every kernel that reads `SlicedWeight`.

    Raises:
        ValueError: if the scratch is too small.
    """
    if weight.bits == BYTE_BITS:
        return weight
    blocks, tiles, _, stored_n, width = weight.fields[0].shape
    shape = (blocks, tiles, BYTE_BITS, stored_n, width)
    size = weight.padded_rows * weight.columns
    scratch = weight.fields[0].new_empty(size) if scratch is None else scratch.view(-1)
    if scratch.numel() < size:
        raise ValueError(f"scratch has {scratch.numel()} bytes, the codes take {size}")
    field = scratch[:size].view(shape)
    _unpack_int8_kernel[(blocks * tiles,)](
        *_three(weight.fields),
        field,
        **_widths(weight.field_bits),
        SLICE=width,
        STORED_N=stored_n,
        INTERP=not isinstance(_unpack_int8_kernel, triton.JITFunction),
        num_warps=4,
    )
    return dataclasses.replace(weight, fields=(field,), field_bits=(BYTE_BITS,))


def unpack_half(weight: SlicedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize to a dense matrix.

    Args:
        weight: 1..8 bits, any groups.
        dtype: float16 or bfloat16.

    Returns:
        ``[N, K]`` of the dtype, contiguous.
    """
    n, k = weight.out_features, weight.in_features
    out = weight.fields[0].new_empty((n, k), dtype=dtype)
    blocks, tiles, _, stored_n, width = weight.fields[0].shape
    _unpack_half_kernel[(blocks * tiles,)](
        *_three(weight.fields),
        weight.scale, weight.zero_point,
        out, out.stride(0),
        n, k, tiles, weight.groups,
        GROUP_SLICES=weight.group_size // width if weight.groups > 1 else 0,
        MULTIPLIER=weight.multiplier,
        **_widths(weight.field_bits),
        SLICE=width,
        STORED_N=stored_n,
        INTERP=not isinstance(_unpack_half_kernel, triton.JITFunction),
        num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def unpack_half_reference(
    codes_NK: torch.Tensor, weight: SlicedWeight, dtype: torch.dtype
) -> torch.Tensor:
    """Compute `unpack_half` in plain torch from the codes, 128 lower where they have 8 bits."""
    n, k = codes_NK.shape
    whole = codes_NK.int().view(n, weight.groups, -1) * weight.multiplier
    whole = whole - weight.zero_point[:n, :, None]
    return (whole.float() * weight.scale[:n, :, None].float()).view(n, k).to(dtype)


@triton.jit
def _unpack_int8_kernel(
    w0_ptr, w1_ptr, w2_ptr,
    out_ptr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    SLICE: tl.constexpr,
    STORED_N: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program writes the eight slices ``[STORED_N, SLICE]`` of one stored tile."""
    RUN: tl.constexpr = STORED_N * SLICE
    tile = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, STORED_N)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    w0, w1, w2 = 0, 0, 0
    for s in tl.static_range(8):
        run0 = w0_ptr + tile * (F0 * RUN) + s * F0 // 8 * RUN
        run1 = w1_ptr + tile * (F1 * RUN) + s * F1 // 8 * RUN
        run2 = w2_ptr + tile * (F2 * RUN) + s * F2 // 8 * RUN
        w0 = hold_run(w0, run0, offs, s, F0)
        w1 = hold_run(w1, run1, offs, s, F1)
        w2 = hold_run(w2, run2, offs, s, F2)
        codes = join_fields(w0, w1, w2, s, F0, F1, F2, INTERP)
        tl.store(out_ptr + tile * (8 * RUN) + s * RUN + offs, codes.to(tl.uint8, bitcast=True))


@triton.jit
def _unpack_half_kernel(
    w0_ptr, w1_ptr, w2_ptr,
    w_scale_ptr, w_zero_ptr,
    out_ptr, stride_on,
    N, K, TILES, GROUPS,
    GROUP_SLICES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    SLICE: tl.constexpr,
    STORED_N: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program writes ``[STORED_N, 8 SLICE]`` weights, those of one stored tile."""
    RUN: tl.constexpr = STORED_N * SLICE
    pid = tl.program_id(0)
    tile = pid.to(tl.int64)
    block = pid // TILES
    rows = tl.arange(0, STORED_N)
    offs_n = pid % TILES * STORED_N + rows
    offs = rows[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    w0, w1, w2 = 0, 0, 0
    for s in tl.static_range(8):
        run0 = w0_ptr + tile * (F0 * RUN) + s * F0 // 8 * RUN
        run1 = w1_ptr + tile * (F1 * RUN) + s * F1 // 8 * RUN
        run2 = w2_ptr + tile * (F2 * RUN) + s * F2 // 8 * RUN
        w0 = hold_run(w0, run0, offs, s, F0)
        w1 = hold_run(w1, run1, offs, s, F1)
        w2 = hold_run(w2, run2, offs, s, F2)
        codes = join_fields(w0, w1, w2, s, F0, F1, F2, INTERP).to(tl.int32) * MULTIPLIER
        g = block * 0
        if GROUP_SLICES > 0:
            g = tl.minimum((block * 8 + s) // GROUP_SLICES, GROUPS - 1)
        zero = tl.load(w_zero_ptr + offs_n * GROUPS + g)
        scale = tl.load(w_scale_ptr + offs_n * GROUPS + g).to(tl.float32)
        w = (codes - zero[:, None]).to(tl.float32) * scale[:, None]
        offs_k = (block * 8 + s) * SLICE + tl.arange(0, SLICE)
        out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + offs_k[None, :]
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask=mask)


def _three(fields: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (*fields, *[fields[0]] * (3 - len(fields)))


def _widths(field_bits: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("F0", "F1", "F2"), (*field_bits, 0, 0), strict=False))
