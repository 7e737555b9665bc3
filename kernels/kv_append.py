"""Appending to the paged key-value cache: rotate, quantize and write in one launch.

    low, high  = min(min_d x, 0), max(max_d x, 0)          per token and key-value head, float32
    scale      = max((high - low) / (2^bits - 1), 1e-5)    x ~ (code - zero_point) * scale
    zero_point = round(-low / scale)                       rounding half to even
    code       = clamp(round(x / scale) + zero_point, 0, 2^bits - 1)

This is `kernels.activation_quant` bit for bit, NaN scales included; at 16 bits states are stored as
they are. Keys are quantized after their rotary embedding, whose products and sum are each rounded
to the dtype of the states, as the modules of a decoder round them:

    y_d = x_d cos_d -+ x_{d +- R/2} sin_d                  - in the first half of R dims, + after it

Shape legend: M tokens, Q query heads, H key-value heads, D dims of a head, R of them rotated,
T tokens of a page.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.activation_quant import MIN_ACTIVATION_SCALE, quantize_activations
from kernels.kv_pages import RAW_BITS, KvPages, field_bits, pack_fields

__all__ = ["HeadStates", "LaunchConfig", "Rotary", "append_kv", "append_kv_reference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStates:
    """What the query-key-value product gave for M tokens: views with adjacent dims will do."""

    query: torch.Tensor | None
    """``[M, Q, D]``; None where there is nothing to rotate."""
    key: torch.Tensor
    """float16, bfloat16 or float32 ``[M, H, D]``."""
    value: torch.Tensor
    """As ``key``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary embedding as a table of angles; frequency scaling is in the table."""

    cos: torch.Tensor
    """float32 ``[positions, R / 2]``, rows adjacent."""
    sin: torch.Tensor
    """As ``cos``."""
    positions: torch.Tensor
    """int32 or int64 ``[M]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Heads of one program, and its warps."""

    block_heads: int
    num_warps: int


def select_config(
    tokens: int, heads: int, table: dict[int, LaunchConfig] | None = None
) -> LaunchConfig:
    """Pick the launch for a number of tokens; not measured.

    One token has to spread over many programs, many tokens are spread anyway.

    Args:
        tokens: M.
        heads: H.
        table: measured configs by the least number of tokens they are for.
    """
    fitting = [tokens_from for tokens_from in table or {} if tokens_from <= tokens]
    if table and fitting:
        return table[max(fitting)]
    block_heads = min(triton.next_power_of_2(heads), 2 if tokens < 64 else 8)
    return LaunchConfig(block_heads=block_heads, num_warps=max(1, block_heads // 2))


def append_kv(
    pages: KvPages,
    states: HeadStates,
    slots: torch.Tensor,
    rotary: Rotary | None = None,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor | None:
    """Rotate queries and keys, quantize keys and values and write them: one launch on a GPU.

    Args:
        pages: written in place.
        states: M tokens.
        slots: int32 or int64 ``[M]``; a negative slot writes nothing.
        rotary: None leaves queries and keys as they are.
        out: for the rotated queries, ``[M, Q, D]`` like them, not the same memory.
        config: None for `select_config`.

    Returns:
        The rotated queries, or what was given as queries without a rotary embedding.

    Raises:
        ValueError: if the shapes or the devices do not fit each other.
    """
    _check_states(pages, states, slots, rotary)
    if pages.codes.device.type == "cpu":
        return append_kv_reference(pages, states, slots, rotary, out=out)
    return launch_append_kv(pages, states, slots, rotary, out=out, config=config)


def launch_append_kv(
    pages: KvPages,
    states: HeadStates,
    slots: torch.Tensor,
    rotary: Rotary | None = None,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor | None:
    """Run the Triton kernel, on a GPU or in the interpreter; see `append_kv`."""
    query, key, value = states.query, states.key, states.value
    config = config or select_config(key.shape[0], pages.kv_heads)
    source, target, query_blocks = key, key, 0
    if query is not None and rotary is not None:
        source, target = query, query.new_empty(query.shape) if out is None else out
        query_blocks = triton.cdiv(query.shape[1], config.block_heads)
    kv_blocks = triton.cdiv(pages.kv_heads, config.block_heads)
    field = RAW_BITS if pages.bits == RAW_BITS else field_bits(pages.bits)
    width = pages.codes.shape[-1]
    if key.shape[0]:
        _append_kv_kernel[(key.shape[0], query_blocks + 2 * kv_blocks)](
            source, source.stride(0), source.stride(1),
            key, key.stride(0), key.stride(1),
            value, value.stride(0), value.stride(1),
            rotary.cos if rotary else key, rotary.sin if rotary else key,
            rotary.positions if rotary else slots,
            slots,
            target, target.stride(0), target.stride(1),
            pages.codes, pages.scale, pages.zero_point,
            source.shape[1], query_blocks, kv_blocks,
            KV_HEADS=pages.kv_heads,
            PAGE=pages.page_size,
            BITS=pages.bits,
            FIELD=field,
            WIDTH=width,
            ROTATED=2 * rotary.cos.shape[1] if rotary else 0,
            MIN_SCALE=MIN_ACTIVATION_SCALE,
            BLOCK_H=config.block_heads,
            BLOCK_C=triton.next_power_of_2(width),
            INTERP=key.device.type == "cpu",
            num_warps=config.num_warps,
            # a fused product and sum would round otherwise than the reference does
            enable_fp_fusion=False,
        )  # fmt: skip
    return target if query_blocks else query


def append_kv_reference(
    pages: KvPages,
    states: HeadStates,
    slots: torch.Tensor,
    rotary: Rotary | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Compute `append_kv` in plain torch on any device."""
    query, key = states.query, states.key
    if rotary is not None:
        key = _rotate(key, rotary)
        if query is not None:
            query = _rotate(query, rotary) if out is None else out.copy_(_rotate(query, rotary))
    kept = slots >= 0
    page, offset = slots[kept].long() // pages.page_size, slots[kept].long() % pages.page_size
    rows = torch.stack([key, states.value], dim=2)[kept].detach()
    if pages.bits == RAW_BITS:
        pages.codes[page, :, :, offset] = rows.to(pages.codes.dtype)
        return query
    quantized = quantize_activations(rows.reshape(-1, pages.head_dim), pages.bits)
    packed = pack_fields(quantized.codes, field_bits(pages.bits))
    pages.codes[page, :, :, offset] = packed.view(*rows.shape[:3], -1)
    pages.scale[page, :, :, offset] = quantized.scale.view(rows.shape[:3])
    zero_point = quantized.zero_point.view(rows.shape[:3])
    pages.zero_point[page, :, offset] = zero_point.to(torch.uint8)
    return query


def _rotate(x_MHD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    half = rotary.cos.shape[1]
    cos = rotary.cos[rotary.positions.long()].to(x_MHD.dtype).unsqueeze(1)
    sin = rotary.sin[rotary.positions.long()].to(x_MHD.dtype).unsqueeze(1)
    first, second, rest = x_MHD.tensor_split((half, 2 * half), dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(turned, dim=-1)


@triton.jit
def _append_kv_kernel(
    query_ptr, stride_qm, stride_qh,
    key_ptr, stride_km, stride_kh,
    value_ptr, stride_vm, stride_vh,
    cos_ptr, sin_ptr, positions_ptr,
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
    MIN_SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
    angle = tl.load(positions_ptr + m).to(tl.int64) * (ROTATED // 2)
    if block < query_blocks:
        head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None, None]
        mask = (head < query_heads) & mask_d
        rows = query_ptr + m * stride_qm + head * stride_qh
        q = _load_rotated(rows, dims, mask, cos_ptr + angle, sin_ptr + angle, ROTATED, INTERP)
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
            x = _load_rotated(rows, dims, mask, cos_ptr, sin_ptr, 0, INTERP)
        else:
            rows = key_ptr + m * stride_km + head * stride_kh
            x = _load_rotated(rows, dims, mask, cos_ptr + angle, sin_ptr + angle, ROTATED, INTERP)
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
def _load_rotated(rows, dims, mask, cos_ptr, sin_ptr, ROTATED: tl.constexpr, INTERP: tl.constexpr):
    """Load a tile and rotate its first ROTATED dims, rounding as separate operations do."""
    x = tl.load(rows + dims, mask=mask, other=0.0)
    if ROTATED:
        HALF: tl.constexpr = ROTATED // 2
        is_first = dims < HALF
        turned = dims < ROTATED
        angle = tl.where(is_first, dims, dims - HALF)
        partner = tl.where(is_first, dims + HALF, dims - HALF)
        y = tl.load(rows + partner, mask=mask & turned, other=0.0).to(tl.float32)
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
def _round_to(x, dtype: tl.constexpr, INTERP: tl.constexpr):
    """Convert float32, half to even; the interpreter cuts bfloat16 off instead."""
    if INTERP and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


def _check_states(
    pages: KvPages, states: HeadStates, slots: torch.Tensor, rotary: Rotary | None
) -> None:
    key, value = states.key, states.value
    expected = (slots.shape[0], pages.kv_heads, pages.head_dim)
    if key.shape != expected or value.shape != expected:
        raise ValueError(
            f"key and value must be {expected}, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError("the dims of a head must be adjacent")
    if rotary is not None and not (rotary.cos.is_contiguous() and rotary.sin.is_contiguous()):
        raise ValueError("the rows of cos and sin must be adjacent")
    if rotary is not None and 2 * rotary.cos.shape[1] > pages.head_dim:
        raise ValueError(f"{2 * rotary.cos.shape[1]} rotated dims do not fit {pages.head_dim}")
    if key.device != pages.codes.device or slots.device != key.device:
        raise ValueError(f"states are on {key.device}, pages on {pages.codes.device}")
