"""The kernel of `kernels.kv_append`: formulas and layout are there.

Shape legend: D dims of a head.
"""

import triton
import triton.language as tl

from kernels.kv_tiles import wait_for_predecessor

__all__ = ["append_kv_kernel"]


@triton.jit
def append_kv_kernel(
    query_ptr, stride_qm, stride_qh,
    key_ptr, stride_km, stride_kh,
    value_ptr, stride_vm, stride_vh,
    cos_ptr, sin_ptr, positions_ptr,
    query_norm_ptr, key_norm_ptr, query_eps, key_eps,
    slots_ptr,
    out_ptr, stride_om, stride_oh,
    codes_ptr, scale_ptr, zero_ptr,
    query_heads, query_blocks, kv_blocks,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_H heads of one token: tile ``[BLOCK_H, fields, BLOCK_C]``."""
    FIELDS: tl.constexpr = 1 if BITS == 16 else 8 // FIELD
    m = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    field = tl.arange(0, FIELDS)
    offs_c = tl.arange(0, BLOCK_C)
    dims = field[None, :, None] * WIDTH + offs_c[None, None, :]
    mask_d = offs_c[None, None, :] < WIDTH
    wait_for_predecessor(PDL)
    angle = tl.load(positions_ptr + m).to(tl.int64) * (ROTATED // 2)
    if block < query_blocks:
        head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None, None]
        mask = (head < query_heads) & mask_d
        rows = query_ptr + m * stride_qm + head * stride_qh
        inverse = _inverse_power(rows, head < query_heads, query_eps, NORM, FIELDS * WIDTH, BLOCK_D)
        q = _load_turned(
            rows,
            dims,
            mask,
            cos_ptr + angle,
            sin_ptr + angle,
            inverse,
            query_norm_ptr,
            NORM,
            ROTATED,
            INTERP,
        )
        tl.store(out_ptr + m * stride_om + head * stride_oh + dims, q, mask=mask)
    else:
        block -= query_blocks
        slot = tl.load(slots_ptr + m).to(tl.int64)
        is_value = block >= kv_blocks
        heads = tl.where(is_value, block - kv_blocks, block) * BLOCK_H + tl.arange(0, BLOCK_H)
        head = heads[:, None, None]
        mask = (head < KV_HEADS) & mask_d
        if is_value:
            rows = value_ptr + m * stride_vm + head * stride_vh
            x = tl.load(rows + dims, mask=mask, other=0.0)
        else:
            rows = key_ptr + m * stride_km + head * stride_kh
            inverse = _inverse_power(rows, head < KV_HEADS, key_eps, NORM, FIELDS * WIDTH, BLOCK_D)
            x = _load_turned(
                rows,
                dims,
                mask,
                cos_ptr + angle,
                sin_ptr + angle,
                inverse,
                key_norm_ptr,
                NORM,
                ROTATED,
                INTERP,
            )
        side = tl.where(is_value, 1, 0)
        base = (slot // PAGE * KV_HEADS + heads) * PAGE
        row = 2 * base + side * PAGE + slot % PAGE
        # a vector, as the interpreter makes no mask of a scalar
        slots = tl.full((BLOCK_H,), 0, dtype=tl.int64) + slot
        kept = (heads < KV_HEADS) & (slots >= 0)
        if BITS == 16:
            out_ptrs = codes_ptr + row[:, None, None] * WIDTH + dims
            stored = x.to(codes_ptr.dtype.element_ty)
            tl.store(out_ptrs, stored, mask=kept[:, None, None] & mask_d)
        else:
            MAX_CODE: tl.constexpr = (1 << BITS) - 1
            x = x.to(tl.float32)
            low = tl.minimum(tl.min(tl.min(x, axis=2), axis=1), 0.0)
            high = tl.maximum(tl.max(tl.max(x, axis=2), axis=1), 0.0)
            # zero, or NaN where a value is not finite
            blemish = tl.sum(tl.sum(x * 0.0, axis=2), axis=1)
            scale = tl.maximum(tl.div_rn(high - low, MAX_CODE * 1.0), MIN_SCALE) + blemish
            zero = (tl.div_rn(-low, scale) + 12582912.0) - 12582912.0
            steps = tl.div_rn(x, tl.broadcast_to(scale[:, None, None], BLOCK_H, FIELDS, BLOCK_C))
            steps = (steps + 12582912.0) - 12582912.0 + zero[:, None, None]
            codes = tl.minimum(tl.maximum(steps, 0.0), MAX_CODE * 1.0).to(tl.int32)
            # fields never overlap, so a sum is a bitwise or
            packed = tl.sum(codes << (field * FIELD)[None, :, None], axis=1).to(tl.uint8)
            out_ptrs = codes_ptr + row[:, None] * WIDTH + offs_c[None, :]
            tl.store(out_ptrs, packed, mask=kept[:, None] & (offs_c < WIDTH)[None, :])
            tl.store(scale_ptr + row, scale, mask=kept)
            pair = base + slot % PAGE
            tl.store(zero_ptr + 2 * pair + side, zero.to(tl.uint8), mask=kept)


@triton.jit
def _inverse_power(
    rows, mask, eps, NORM: tl.constexpr, DIMS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """``1 / sqrt(mean x^2 + eps)`` of each head, summed in the order of `kernels.layer_math`."""
    if NORM == "none":
        return mask
    else:
        HEADS: tl.constexpr = mask.shape[0]
        offs_d = tl.arange(0, BLOCK_D)[None, None, :]
        x = tl.load(rows + offs_d, mask=mask & (offs_d < DIMS), other=0.0).to(tl.float32)
        x = tl.reshape(x * x, (HEADS, BLOCK_D // 2, 2))
        left, right = tl.split(x)
        left, right = tl.split(tl.reshape(left + right, (HEADS, BLOCK_D // 4, 2)))
        left, right = tl.split(tl.reshape(left + right, (HEADS, BLOCK_D // 8, 2)))
        # a constexpr takes the dtype of what it multiplies: float64
        power = (tl.sum((left + right).to(tl.float64), 1) * (1.0 / DIMS)).to(tl.float32)
        one = tl.full((HEADS,), 1.0, dtype=tl.float32)
        return tl.div_rn(one, tl.sqrt_rn(power + eps))[:, None, None]


@triton.jit
def _load_turned(
    rows, dims, mask, cos_ptr, sin_ptr, inverse, norm_ptr,
    NORM: tl.constexpr, ROTATED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Load a tile, normalize it and rotate its first ROTATED dims, rounding as modules do."""
    x = _load_normed(rows, dims, mask, inverse, norm_ptr, NORM, INTERP)
    if ROTATED:
        HALF: tl.constexpr = ROTATED // 2
        is_first = dims < HALF
        turned = dims < ROTATED
        angle = tl.where(is_first, dims, dims - HALF)
        partner = tl.where(is_first, dims + HALF, dims - HALF)
        y = _load_normed(rows, partner, mask & turned, inverse, norm_ptr, NORM, INTERP)
        y = y.to(tl.float32)
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        cos = _round_to(cos, x.dtype, INTERP).to(tl.float32)
        sin = _round_to(sin, x.dtype, INTERP).to(tl.float32)
        straight = _round_to(x.to(tl.float32) * cos, x.dtype, INTERP).to(tl.float32)
        across = _round_to(y * sin, x.dtype, INTERP).to(tl.float32)
        across = tl.where(is_first, -across, across)
        x = tl.where(turned, _round_to(straight + across, x.dtype, INTERP), x)
    return x


@triton.jit
def _load_normed(
    rows, dims, mask, inverse, norm_ptr, NORM: tl.constexpr, INTERP: tl.constexpr
):  # fmt: skip
    """Load dims of heads, times the inverse root of their power and a weight."""
    x = tl.load(rows + dims, mask=mask, other=0.0)
    if NORM == "none":
        return x
    else:
        weight = tl.load(norm_ptr + dims, mask=mask, other=0.0).to(tl.float32)
        y = x.to(tl.float32) * inverse
        if NORM == "rms":
            y = weight * _round_to(y, x.dtype, INTERP).to(tl.float32)
        else:
            y = y * (weight + 1.0)
        return _round_to(y, x.dtype, INTERP)


@triton.jit
def _round_to(x, dtype: tl.constexpr, INTERP: tl.constexpr):
    """Convert float32, half to even; the interpreter cuts bfloat16 off instead."""
    if INTERP and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
