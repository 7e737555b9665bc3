"""The Gluon decode of `kernels.binary_linear`: the formula, the operands and the legend are there.

Gluon fixes which lane holds which element, so that an instruction of a whole warp may stand in
inline assembly: `pack=4` hands it the four words of a lane, and operands of another shape are
broadcast in registers. Nothing here has an interpreter; tests read the machine code.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "axis3",
    "bmma",
    "bmma_decode_kernel",
    "correct",
    "load_rows",
    "load_tokens",
    "scale",
]


@gluon.jit
def bmma_decode_kernel(
    w_ptr, stride_wn, stride_wk, stride_wp,
    x_ptr, stride_xm, stride_xk,
    w_scale_ptr, w_zero_ptr, w_sums_ptr,
    x_scale_ptr, x_zero_ptr, x_sums_ptr,
    bias_ptr,
    out_ptr, stride_om,
    M, N, K, T, B, J, S,
    P: gl.constexpr,
    SHIFT: gl.constexpr,
    MULTIPLIER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROW_TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    HALVES: gl.constexpr,
    WIDTH: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    STEPS: gl.constexpr,
    TURNS: gl.constexpr,
    GROUPED: gl.constexpr,
):  # fmt: skip
    """One CTA: ROW_TILES tiles of outputs times all columns, K shared by warps and registers.

    Tiles are ``[COLUMN_TILES, WARPS_K * STEPS, ROW_TILES, 32, 4]``: lane and word last.
    """
    SLOTS: gl.constexpr = STEPS * WARPS_K
    FULL: gl.constexpr = gl.BlockedLayout(
        [COLUMN_TILES, STEPS, ROW_TILES // WARPS_N, 1, 4],
        [1, 1, 1, 32, 1],
        [1, WARPS_K, WARPS_N, 1, 1],
        [4, 3, 2, 1, 0],
    )
    SUMMED: gl.constexpr = gl.SliceLayout(1, FULL)
    j = _axis4(COLUMN_TILES, SUMMED, 1, 2, 3)
    tile = gl.program_id(0) * ROW_TILES + _axis4(ROW_TILES, SUMMED, 0, 2, 3)
    lane = _axis4(32, SUMMED, 0, 1, 3)
    word = _axis4(4, SUMMED, 0, 1, 2)
    slot = gl.expand_dims(_axis4(SLOTS, gl.SliceLayout(0, FULL), 1, 2, 3), 0)
    n = tile * 16 + lane // 4 + 8 * (word // 2)
    column = j * 16 + 2 * (lane % 4) + word % 2
    bit = column % WIDTH
    place = gl.expand_dims(lane * 4 + word, 1)
    w_ptrs = w_ptr + gl.expand_dims(tile, 1).to(gl.int64) * stride_wn + place
    x_ptrs = x_ptr + gl.expand_dims(j, 1) * stride_xm + place
    mask_t = gl.expand_dims(tile < T, 1)
    mask_j = gl.expand_dims(j < J, 1)

    zero = gl.full([COLUMN_TILES, SLOTS, ROW_TILES, 32, 4], 0, gl.int32, FULL)
    # what scales the result comes from memory as weights do: asked for first, it costs no time
    rows = load_rows(w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr, n, N, HAS_BIAS, GROUPED)
    tokens = ()
    for half in gl.static_range(HALVES):
        m = (column + 8 * half) // WIDTH
        tokens += (  # type: ignore[assignment]  # Triton's tuples grow
            load_tokens(x_scale_ptr, x_zero_ptr, x_sums_ptr, m, M, K, SHIFT, GROUPED),
        )
    acc0 = zero.to(gl.float32) if GROUPED else zero
    acc1 = acc0
    for turn in range(TURNS):
        k = turn * SLOTS + slot
        x = gl.load(x_ptrs + k * stride_xk, mask=mask_j & (k < B), other=0)
        planes = ()
        for a in gl.static_range(P):
            ptrs = w_ptrs + k * stride_wk + a * stride_wp
            planes += (  # type: ignore[assignment]  # Triton's tuples grow
                gl.load(ptrs, mask=mask_t & (k < B), other=0, eviction_policy="evict_first"),
            )
        for half in gl.static_range(HALVES):
            acc = acc1 if half else acc0
            if GROUPED:
                acc = _add_groups(
                    acc, planes, x, k, n, column + 8 * half, mask_t, w_scale_ptr, w_zero_ptr,
                    x_zero_ptr, x_sums_ptr, M, T, S, zero, P, SHIFT, MULTIPLIER, WIDTH, half,
                )  # fmt: skip
            else:
                acc = _add_planes(acc, planes, x, zero, P, half)
            acc0, acc1 = (acc0, acc) if half else (acc, acc1)
    for half in gl.static_range(HALVES):
        acc = acc1 if half else acc0
        m = (column + 8 * half) // WIDTH
        if GROUPED:
            total = gl.sum(acc, 1)
        else:
            total = _sum_columns(gl.sum(acc << gl.expand_dims(bit, 1), 1), WIDTH)
            total = correct(total, rows, tokens[half], K, MULTIPLIER)
        out = scale(total, rows, tokens[half], HAS_BIAS)
        # every column of a token holds its sum; the first one writes
        ptrs = out_ptr + m.to(gl.int64) * stride_om + n
        gl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(bit == 0) & (m < M) & (n < N))


@gluon.jit
def _add_planes(acc, planes, x, zero, P: gl.constexpr, HALF: gl.constexpr):
    """Add 2^a times the product of every plane a."""
    acc = bmma(planes[0], x, acc, HALF)
    for a in gl.static_range(1, P):
        acc += bmma(planes[a], x, zero, HALF) << a
    return acc


@gluon.jit
def _add_groups(
    acc, planes, x, k, n, column, mask_t, w_scale_ptr, w_zero_ptr, x_zero_ptr, x_sums_ptr,
    M, T, S, zero,
    P: gl.constexpr, SHIFT: gl.constexpr, MULTIPLIER: gl.constexpr, WIDTH: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Add s_w I of both groups of a step to every column of their token."""
    m = gl.expand_dims(column // WIDTH, 1)
    bit = gl.expand_dims(column % WIDTH, 1)
    n = gl.expand_dims(n, 1)
    # corrections go to one column of a token, before its columns are summed
    first = (bit == 0) & (m < M)
    z_x = gl.load(x_zero_ptr + m, mask=first, other=-SHIFT) + SHIFT
    ones = zero - 1
    for h in gl.static_range(2):
        g = 2 * k + h
        inside = mask_t & (g < S)
        s_w = gl.load(w_scale_ptr + g * (T * 16) + n, mask=inside, other=0.0).to(gl.float32)
        z_w = gl.load(w_zero_ptr + g * (T * 16) + n, mask=inside, other=0).to(gl.int32)
        mask = first & (g < S)
        r_x = gl.load(x_sums_ptr + m * S + g, mask=mask, other=-SHIFT * 128) + SHIFT * 128
        total = zero
        # summing a row again on idle tensor cores costs no memory
        w_sum = zero
        for a in gl.static_range(P):
            total += _bmma_half(planes[a], x, zero, HALF, h) << a
            w_sum += _bmma_half(planes[a], ones, zero, 0, h) << a
        integer = (MULTIPLIER * total << bit) - z_w * (r_x - 128 * z_x) - MULTIPLIER * z_x * w_sum
        acc += _sum_columns(integer, WIDTH).to(gl.float32) * s_w
    return acc


@gluon.jit
def load_rows(
    w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr, n, N,
    HAS_BIAS: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """Return bias, and scale, zero-point and sum of whole rows; what is not there is never read."""
    bias, s_w, z_w, w_sum = n, n, n, n
    if HAS_BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    if not GROUPED:
        s_w = gl.load(w_scale_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        z_w = gl.load(w_zero_ptr + n, mask=n < N, other=0).to(gl.int32)
        w_sum = gl.load(w_sums_ptr + n, mask=n < N, other=0)
    return bias, s_w, z_w, w_sum


@gluon.jit
def load_tokens(
    x_scale_ptr, x_zero_ptr, x_sums_ptr, m, M, K, SHIFT: gl.constexpr, GROUPED: gl.constexpr
):
    """Return what belongs to tokens: scale, and zero-point and sum of the unsigned codes."""
    s_x = gl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    z_x, r_x = m, m
    if not GROUPED:
        z_x = gl.load(x_zero_ptr + m, mask=m < M, other=0) + SHIFT
        r_x = gl.load(x_sums_ptr + m, mask=m < M, other=0) + SHIFT * K
    return s_x, z_x, r_x


@gluon.jit
def correct(total, rows, tokens, K, MULTIPLIER: gl.constexpr):
    """Correct the zero-points of whole rows in int32, convert once, times the scale of the row."""
    z_x, r_x = tokens[1], tokens[2]
    integer = MULTIPLIER * total - rows[2] * (r_x - K * z_x) - MULTIPLIER * z_x * rows[3]
    return integer.to(gl.float32) * rows[1]


@gluon.jit
def scale(total, rows, tokens, HAS_BIAS: gl.constexpr):
    out = total * tokens[0]
    return out + rows[0] if HAS_BIAS else out


@gluon.jit
def bmma(w, x, acc, HALF: gl.constexpr):
    """Return acc + the product with 8 of the 16 columns: words 0, 1 of x or words 2, 3."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {$0,$1,$2,$3},{$4,$5,$6,$7},"
        + ("{$10,$11}" if HALF else "{$8,$9}") + ",{$12,$13,$14,$15};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w, x, acc], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _bmma_half(w, x, acc, HALF: gl.constexpr, H: gl.constexpr):
    """The same of 128 columns of K, the first or the second of a step."""
    A: gl.constexpr = "{$6,$7}" if H else "{$4,$5}"
    X: gl.constexpr = ("{$11}" if H else "{$10}") if HALF else ("{$9}" if H else "{$8}")
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0,$1,$2,$3},"
        + A + "," + X + ",{$12,$13,$14,$15};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w, x, acc], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _sum_columns(value, WIDTH: gl.constexpr):
    """Give every column of a token, 2 in a lane and WIDTH / 2 lanes, the sum of them all."""
    TWO: gl.constexpr = (
        "shfl.sync.bfly.b32 t, a, 1, 31, -1; add.s32 a, a, t;"
        "shfl.sync.bfly.b32 t, b, 1, 31, -1; add.s32 b, b, t;"
    )
    FOUR: gl.constexpr = (
        "shfl.sync.bfly.b32 t, a, 2, 31, -1; add.s32 a, a, t;"
        "shfl.sync.bfly.b32 t, b, 2, 31, -1; add.s32 b, b, t;"
    )
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b, t; add.s32 a, $4, $5; add.s32 b, $6, $7;"
        + (TWO if WIDTH > 2 else "") + (FOUR if WIDTH > 4 else "")
        + "mov.b32 $0, a; mov.b32 $1, a; mov.b32 $2, b; mov.b32 $3, b; }",
        "=r,=r,=r,=r,r,r,r,r",
        [value], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def axis3(SIZE: gl.constexpr, LAYOUT: gl.constexpr, A0: gl.constexpr, A1: gl.constexpr):
    """Count along the axis of a 3-d layout that is neither A0 nor A1, A0 < A1."""
    layout: gl.constexpr = gl.SliceLayout(A0, gl.SliceLayout(A1, LAYOUT))
    return gl.expand_dims(gl.expand_dims(gl.arange(0, SIZE, layout), A0), A1)


@gluon.jit
def _axis4(
    SIZE: gl.constexpr, LAYOUT: gl.constexpr,
    A0: gl.constexpr, A1: gl.constexpr, A2: gl.constexpr,
):  # fmt: skip
    """The same of a 4-d layout."""
    return gl.expand_dims(axis3(SIZE, gl.SliceLayout(A2, LAYOUT), A0, A1), A2)
