"""Products of 16-bit activations and sliced weights: decode and small batches in one kernel.

    Y[m,n] = sum_g s_w[n,g] (c D[m,n,g] - (z_w[n,g] - c h) R[m,g]) + bias[n]             float32
    D[m,n,g] = sum_{k in g} x[m,k] (u_w[n,k] - h)          R[m,g] = sum_{k in g} x[m,k]

h is the middle code, 0 for signed bytes; u - h has at most 8 bits and is exact in both 16-bit
types, so no weight is rounded at all. c is the multiplier of the weight.

Two neighbouring bytes of a run are one 16-bit lane, as wide as an element of the product: its low
byte holds an even column and its high byte the odd one, so each slice is two products. Activations
are put in that order first, even columns of a slice before odd ones, and summed meanwhile.

    float16    1024 + u = 0x6400 | u         bfloat16    128 + u = 0x4300 | u for u < 128
    bfloat16, signed bytes of 7 bits and a sign b:  (128 + b) - (sign ? 256 : 128)

More than 64 tokens dequantize the weight once and leave the product to cuBLAS.

Shape legend: M tokens, N outputs (NP with padding), K inputs (L with padding), S groups, G bytes of
a slice.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.field_codes import move_field
from kernels.sliced import SlicedWeight
from kernels.unpack import unpack_half

__all__ = ["HalfConfig", "half_configs", "half_linear", "half_linear_reference"]

MOST_TOKENS = 64
EVERY_LANE = 0x00010001


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfConfig:
    """Tile and launch parameters of one kernel launch."""

    block_m: int
    """8..64 tokens."""
    block_n: int
    """32..256 outputs."""
    block_k: int
    """Bytes of a run in one step, 32..128; a stored slice is cut to it."""
    num_warps: int
    num_stages: int
    splits: int = 1
    """Programs that share the K of one tile."""


def half_configs(*, bits: int, m: int, n: int, columns: int) -> list[HalfConfig]:
    """Launches worth timing for a shape of at most 64 tokens, best guess first."""
    block_m = max(8, triton.next_power_of_2(m))
    found = []
    for block_n, warps in ((64, 4), (128, 4), (128, 8), (32, 2)):
        tiles = triton.cdiv(n, block_n)
        per_wave = triton.cdiv(3 * 132 * 4, 4 if warps < 8 else 8)
        splits = max(1, min(8, per_wave // tiles, columns // 2048))
        for count in dict.fromkeys((splits, max(1, splits // 2), 2 * splits)):
            for stages in (4, 3):
                found.append(
                    HalfConfig(
                        block_m=block_m, block_n=block_n, block_k=128 if bits <= 4 else 64,
                        num_warps=warps, num_stages=stages, splits=count,
                    )  # fmt: skip
                )
    return found


def half_linear(
    x: torch.Tensor,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    config: HalfConfig | None = None,
) -> torch.Tensor:
    """Multiply activations of 16 bits by a sliced weight.

    Args:
        x: float16 or bfloat16 ``[M, K]``, rows contiguous.
        weight: N outputs of K codes.
        bias: float ``[N]`` or None.
        config: how to launch at most 64 tokens; None takes the first of `half_configs`.

    Returns:
        ``[M, N]`` in the dtype of ``x``.

    Raises:
        ValueError: if K or the dtype does not fit.
    """
    _check(x, weight)
    m = x.shape[0]
    if m > MOST_TOKENS:
        w_NK = unpack_half(weight, x.dtype)
        return torch.nn.functional.linear(x, w_NK, None if bias is None else bias.to(x.dtype))
    out = x.new_empty((m, weight.out_features))
    if m:
        ordered, sums = order_columns(x, weight)
        config = config or half_configs(
            bits=weight.bits, m=m, n=weight.padded_rows, columns=weight.columns
        )[0]  # fmt: skip
        _launch(ordered, sums, weight, bias, out, config)
    return out


def order_columns(x: torch.Tensor, weight: SlicedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the even columns of every slice before the odd ones and sum the groups.

    Returns:
        ``[M, L]`` in the dtype of ``x`` and float32 ``[M, S]``.
    """
    m, k = x.shape
    ordered = x.new_empty((m, weight.columns))
    sums = x.new_empty((m, weight.groups), dtype=torch.float32)
    _order_kernel[(m, weight.groups)](
        x, x.stride(0),
        ordered, ordered.stride(0),
        sums,
        k, weight.columns, weight.groups, weight.group_size,
        HALF_SLICE=weight.slice_bytes // 2,
        BLOCK_K=1024,
        num_warps=4,
    )  # fmt: skip
    return ordered, sums


def half_linear_reference(
    x: torch.Tensor, codes_NK: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `half_linear` in float64 from the codes, 128 lower where they have 8 bits."""
    n, k = codes_NK.shape
    w = codes_NK.double().view(n, weight.groups, -1) * weight.multiplier
    w = (w - weight.zero_point[:n, :, None]) * weight.scale[:n, :, None].double()
    y = x.double() @ w.view(n, k).t()
    return y if bias is None else y + bias.double()


def _launch(
    ordered: torch.Tensor,
    sums: torch.Tensor,
    weight: SlicedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: HalfConfig,
) -> None:
    m, n = out.shape
    width, groups = weight.slice_bytes, weight.groups
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(weight.padded_rows, config.block_n)
    split_tiles = tiles if config.splits > 1 else 0
    size = config.splits * split_tiles * config.block_n * config.block_m
    field_bits = (*weight.field_bits, 0, 0)
    fields = [field.view(torch.int16) for field in weight.fields]
    _half_kernel[(tiles, config.splits)](
        ordered, ordered.stride(0), sums,
        *fields, *[fields[0]] * (3 - len(fields)),
        weight.scale, weight.zero_point,
        bias if bias is not None else weight.scale,
        out, out.stride(0),
        sums.new_empty(size), weight.sums.new_zeros(split_tiles),
        m, n, weight.padded_rows, weight.columns // (8 * width), groups,
        BITS=weight.bits,
        F0=field_bits[0],
        F1=field_bits[1],
        F2=field_bits[2],
        SLICE=width,
        STORED_N=weight.block_rows,
        GROUP_SLICES=weight.group_size // width if groups > 1 else 0,
        MULTIPLIER=weight.multiplier,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=width if groups > 1 else min(config.block_k, width),
        SPLITS=config.splits,
        INTERP=not isinstance(_half_kernel, triton.JITFunction),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


@triton.jit
def _order_kernel(
    x_ptr, stride_xm,
    out_ptr, stride_om,
    sums_ptr,
    K, L, GROUPS, GROUP_SIZE,
    HALF_SLICE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program orders and sums one group of one token; the last group fills the padding."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = g * GROUP_SIZE
    last = L if g == GROUPS - 1 else first + GROUP_SIZE
    total = tl.full((BLOCK_K,), 0.0, tl.float32)
    for start in range(first, last, BLOCK_K):
        # column `to` of the output and the one it comes from
        to = start + tl.arange(0, BLOCK_K)
        within = to % (2 * HALF_SLICE)
        k = to - within + within % HALF_SLICE * 2 + within // HALF_SLICE
        inside = to < last
        x = tl.load(x_ptr + row * stride_xm + k, mask=inside & (k < K), other=0.0)
        tl.store(out_ptr + row * stride_om + to, x, mask=inside)
        total += x.to(tl.float32)
    tl.store(sums_ptr + row * GROUPS + g, tl.reduce(total, 0, _add))


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _half_kernel(
    x_ptr, stride_xm, x_sums_ptr,
    w0_ptr, w1_ptr, w2_ptr,
    w_scale_ptr, w_zero_ptr,
    bias_ptr,
    out_ptr, stride_om,
    partial_ptr, arrivals_ptr,
    M, N, NP, BLOCKS, GROUPS,
    BITS: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    SLICE: tl.constexpr,
    STORED_N: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program computes a tile ``[BLOCK_N, BLOCK_M]`` over its share of K, weights on the left.

    Lengths of weights are in lanes of 16 bits. GROUP_SLICES is 0 with one scale a row.
    """
    NARROWEST: tl.constexpr = F2 if F2 else (F1 if F1 else F0)
    TURN: tl.constexpr = 8 // NARROWEST
    CUTS: tl.constexpr = SLICE // BLOCK_K
    LANES: tl.constexpr = SLICE // 2
    RUN: tl.constexpr = STORED_N * LANES
    WIDTH: tl.constexpr = BLOCK_K // 2
    GROUPED: tl.constexpr = GROUP_SLICES > 0
    IS_HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    tl.static_assert(CUTS == 1 or not GROUPED, "a group takes whole slices")
    tiles_n = (NP + BLOCK_N - 1) // BLOCK_N
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows beyond the edge repeat the last one and are not stored: loads need no masks
    rows_n = tl.minimum(offs_n, NP - 1)
    rows_m = tl.minimum(offs_m, M - 1)
    offs_k = tl.arange(0, WIDTH)
    x_offs = rows_m[:, None] * stride_xm + offs_k[None, :]
    tile_n, row_n = rows_n // STORED_N, (rows_n % STORED_N) * LANES
    w0_offs = (tile_n * (F0 * RUN) + row_n)[:, None] + offs_k[None, :]
    w1_offs = (tile_n * (F1 * RUN) + row_n)[:, None] + offs_k[None, :]
    w2_offs = (tile_n * (F2 * RUN) + row_n)[:, None] + offs_k[None, :]

    UNIT: tl.constexpr = GROUP_SLICES if GROUPED else 1
    turns = BLOCKS * NARROWEST
    share = (turns + UNIT * SPLITS - 1) // (UNIT * SPLITS) * UNIT
    first = tl.minimum(tl.program_id(1) * share, turns)
    last = tl.minimum(first + share, turns)
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for step in range(first * CUTS, last * CUTS):
        turn = step // CUTS
        cut = (step % CUTS) * WIDTH
        block = (turn // NARROWEST).to(tl.int64) * NP * LANES
        part = turn % NARROWEST * TURN
        k = turn * (TURN * SLICE) + cut
        for s in tl.static_range(TURN):
            if s * F0 % 8 == 0:
                run0 = w0_ptr + (block * F0 + ((part + s) * F0 // 8 * RUN + cut))
                w0 = tl.load(run0 + w0_offs)
            if F1 == 0:
                w1 = w0
            elif s * F1 % 8 == 0:
                run1 = w1_ptr + (block * F1 + ((part + s) * F1 // 8 * RUN + cut))
                w1 = tl.load(run1 + w1_offs)
            if F2 == 0:
                w2 = w0
            elif s * F2 % 8 == 0:
                run2 = w2_ptr + (block * F2 + ((part + s) * F2 // 8 * RUN + cut))
                w2 = tl.load(run2 + w2_offs)
            for odd in tl.static_range(2):
                x = tl.load(x_ptr + (k + s * SLICE + odd * LANES) + x_offs)
                w = _centred(w0, w1, w2, s, odd, BITS, F0, F1, F2, IS_HALF, INTERP)
                if INTERP:
                    # the interpreter multiplies bfloat16 wrongly
                    x = x.to(tl.float32)
                acc = tl.dot(w, x.T, acc)
            if GROUPED:
                # a turn of whole groups closes each where it ends; else the end is found at run time
                if (
                    (s + 1) % GROUP_SLICES == 0
                    if TURN % GROUP_SLICES == 0
                    else (turn * TURN + s + 1) % GROUP_SLICES == 0
                ):
                    g = (turn * TURN + s) // GROUP_SLICES
                    total += _scaled(
                        acc, g, GROUPS, BITS, MULTIPLIER, rows_m, rows_n,
                        x_sums_ptr, w_scale_ptr, w_zero_ptr,
                    )  # fmt: skip
                    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)

    part = total if GROUPED else acc
    mine = True
    if SPLITS > 1:
        tile = tl.program_id(0)
        slot = (tile * SPLITS).to(tl.int64) * (BLOCK_N * BLOCK_M) + partial_ptr
        offs_slot = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(slot + tl.program_id(1) * (BLOCK_N * BLOCK_M) + offs_slot, part)
        # the barrier puts the stores of all threads before the release of the one that counts
        tl.debug_barrier()
        mine = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if mine:
            part = tl.load(slot + offs_slot, cache_modifier=".cg")
            for split in tl.range(1, SPLITS):
                part += tl.load(
                    slot + split * (BLOCK_N * BLOCK_M) + offs_slot, cache_modifier=".cg"
                )
            tl.store(arrivals_ptr + tile, 0)
    if mine:
        y = part
        if not GROUPED:
            y = _scaled(
                part, 0, GROUPS, BITS, MULTIPLIER, rows_m, rows_n,
                x_sums_ptr, w_scale_ptr, w_zero_ptr,
            )  # fmt: skip
        mask_n = offs_n < N
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + offs_n[:, None] + offs_m.to(tl.int64)[None, :] * stride_om
        mask = mask_n[:, None] & (offs_m < M)[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scaled(
    acc, g, GROUPS, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, rows_m, rows_n,
    x_sums_ptr, w_scale_ptr, w_zero_ptr,
):  # fmt: skip
    """Correct the sums of a group for its zero-point and scale them."""
    MIDDLE: tl.constexpr = 0 if BITS == 8 else 1 << (BITS - 1)
    # slices of padding lie beyond the last group and add nothing
    inside = rows_n * 0 + g < GROUPS
    w_zero = tl.load(w_zero_ptr + rows_n * GROUPS + g, mask=inside, other=0)
    w_scale = tl.load(w_scale_ptr + rows_n * GROUPS + g, mask=inside, other=0.0).to(tl.float32)
    x_sum = tl.load(x_sums_ptr + rows_m * GROUPS + g, mask=rows_m * 0 + g < GROUPS, other=0.0)
    off = (w_zero - MULTIPLIER * MIDDLE).to(tl.float32)
    return (acc * MULTIPLIER - off[:, None] * x_sum[None, :]) * w_scale[:, None]


@triton.jit
def _centred(
    w0, w1, w2,
    S: tl.constexpr,
    ODD: tl.constexpr,
    BITS: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    IS_HALF: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Codes less their middle, of the even or the odd columns of slice S, from lanes of two bytes.

    Two lanes share a register; a field moves to its place by one shift and one mask.
    """
    MIDDLE: tl.constexpr = 0 if BITS == 8 else 1 << (BITS - 1)
    if INTERP:
        code = (w0.to(tl.int32) >> (8 * ODD + S * F0 % 8)) & ((1 << F0) - 1)
        if F1 > 0:
            code |= ((w1.to(tl.int32) >> (8 * ODD + S * F1 % 8)) & ((1 << F1) - 1)) << F0
        if F2 > 0:
            code |= ((w2.to(tl.int32) >> (8 * ODD + S * F2 % 8)) & ((1 << F2) - 1)) << (F0 + F1)
        if BITS == 8:
            code = (code ^ 128) - 128
        return (code - MIDDLE).to(tl.float32)
    ASSEMBLY: tl.constexpr = centred_assembly(F0, F1, F2, S, ODD, IS_HALF)
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        "=r,r,r,r",
        [w0, w1, w2],
        dtype=tl.float16 if IS_HALF else tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.constexpr_function
def centred_assembly(f0: int, f1: int, f2: int, s: int, odd: int, is_half: bool) -> str:  # noqa: FBT001  known at compile time
    """Write the assembly of `_centred`: gather the fields in u, make numbers of them, subtract."""
    byte = 8 * odd
    moves = move_field(0, byte + s * f0 % 8, f0, 0, EVERY_LANE)
    if f1:
        moves += move_field(1, byte + s * f1 % 8, f1, f0, EVERY_LANE)
    if f2:
        moves += move_field(2, byte + s * f2 % 8, f2, f0 + f1, EVERY_LANE)
    bits = f0 + f1 + f2
    middle = 1 << (bits - 1)
    if is_half:
        # a flipped sign bit adds 128, the middle of 8 bits
        number = 0x6480 if bits == 8 else 0x6400
        less = (0x6400 + middle) * EVERY_LANE
        ending = f"xor.b32 u, u, {number * EVERY_LANE}; mov.b32 t, {less}; sub.f16x2 $0, u, t;"
    elif bits == 8:
        ending = (
            "and.b32 t, u, 0x00800080; and.b32 u, u, 0x007f007f; or.b32 t, t, 0x43004300; "
            "or.b32 u, u, 0x43004300; mov.b32 c, 0xbf80bf80; fma.rn.bf16x2 $0, t, c, u;"
        )
    else:
        # a step of one is the last bit of a bfloat16 from 128 to 255
        less = (0xC300 + middle) * EVERY_LANE
        ending = (
            f"or.b32 u, u, 0x43004300; mov.b32 t, {less}; mov.b32 c, 0x3f803f80; "
            "fma.rn.bf16x2 $0, u, c, t;"
        )
    return "{ .reg .b32 t, u, c; " + moves + ending + " }"


def _check(x: torch.Tensor, weight: SlicedWeight) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations must be float16 or bfloat16, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.stride(1) != 1:
        raise ValueError(
            f"activations {tuple(x.shape)} of strides {x.stride()} do not fit"
            f" K = {weight.in_features}"
        )
    if x.device != weight.scale.device:
        raise ValueError(f"activations are on {x.device}, weights on {weight.scale.device}")
