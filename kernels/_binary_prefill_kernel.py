"""The Gluon prefill of `kernels.binary_linear`: the formula, the operands and the legend are there.

Every warp holds ROWS row tiles of products. Within a chunk of K it goes through the levels
s = a + b, and through its rows at each, so that one row is rotated while others are multiplied:

    level            0            1            2        next chunk, downwards: 2, 1, 0
    multiplied       0 1 2 3      0 1 2 3      0 1 2 3
    rotated            0 1 2      3 0 1 2      3

A fragment of tokens stays in registers from the first level that needs it to the last; one of
weights is read for each plane that it meets. The copies of a later chunk start behind the products
of the first level, into the memory of the chunk before: one barrier a chunk is enough, where its
copies are waited for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kernels._binary_linear_kernel import axis3, bmma, correct, load_rows, load_tokens, scale

__all__ = ["bmma_prefill_kernel"]

# Triton renamed it between 3.6 and 3.9 and left a stub behind
_copy_async = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)


@gluon.jit
def bmma_prefill_kernel(
    w_ptr, stride_wn, stride_wk, stride_wp,
    x_ptr, stride_xm, stride_xk,
    w_scale_ptr, w_zero_ptr, w_sums_ptr,
    x_scale_ptr, x_zero_ptr, x_sums_ptr,
    bias_ptr,
    out_ptr, stride_om,
    M, N, K, T, B, J,
    P: gl.constexpr,
    Q: gl.constexpr,
    SHIFT: gl.constexpr,
    MULTIPLIER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROW_TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_M: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One CTA: a tile of 16 ROW_TILES outputs x 16 COLUMN_TILES tokens over all of K."""
    WARPS: gl.constexpr = WARPS_N * WARPS_M
    ROWS: gl.constexpr = ROW_TILES // WARPS_N
    # a turn of the loop goes up as often as down, and round all stages
    CHUNKS: gl.constexpr = STAGES * (1 + STAGES % 2)
    # of one row tile of every warp
    ROW: gl.constexpr = gl.BlockedLayout(
        [1, COLUMN_TILES // WARPS_M, 1, 4], [1, 1, 32, 1], [WARPS_N, WARPS_M, 1, 1], [3, 2, 1, 0]
    )
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    w_tile = gl.program_id(0) * ROW_TILES + axis3(ROW_TILES, COPY, 1, 2)
    x_tile = gl.program_id(1) * COLUMN_TILES + axis3(COLUMN_TILES, COPY, 1, 2)
    place = axis3(32, COPY, 0, 2) * 4 + axis3(4, COPY, 0, 1)
    w_ptrs = w_ptr + w_tile.to(gl.int64) * stride_wn + place
    x_ptrs = x_ptr + x_tile.to(gl.int64) * stride_xm + place
    w_shared = _allocate(STAGES * STEPS * P, ROW_TILES)
    x_shared = _allocate(STAGES * STEPS * Q, COLUMN_TILES)
    for ahead in gl.static_range(STAGES - 1):
        for part in gl.static_range(ROWS):
            _fetch(
                w_shared, x_shared, w_ptrs, x_ptrs, w_tile < T, x_tile < J, stride_wk, stride_wp,
                stride_xk, ahead, B, ahead, part, ROWS, P, Q, STEPS,
            )  # fmt: skip
    accs = ()
    for _ in gl.static_range(2 * ROWS):
        accs += (gl.full([WARPS_N, COLUMN_TILES, 32, 4], 0, gl.int32, ROW),)  # type: ignore[assignment]
    for turn in range((B + CHUNKS * STEPS - 1) // (CHUNKS * STEPS)):
        for c in gl.static_range(CHUNKS):
            async_copy.wait_group(STAGES - 2)
            accs = _add_chunk(
                accs, w_shared, x_shared, w_ptrs, x_ptrs, w_tile < T, x_tile < J, stride_wk,
                stride_wp, stride_xk, turn * CHUNKS + c + STAGES - 1, B, c % STAGES,
                (c + STAGES - 1) % STAGES, c % 2, P, Q, STEPS, WARPS_N, ROWS, ROW,
            )  # fmt: skip
    async_copy.wait_group(0)

    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [16 // WARPS_N, 2 * WARPS_N], [WARPS, 1], [1, 0])
    row = gl.arange(0, COLUMN_TILES * 16, gl.SliceLayout(1, OUT))
    m = gl.expand_dims(gl.program_id(1) * COLUMN_TILES * 16 + row, 1)
    tokens = load_tokens(x_scale_ptr, x_zero_ptr, x_sums_ptr, m, M, K, SHIFT, GROUPED=False)
    place_n = gl.expand_dims(gl.arange(0, WARPS_N * 16, gl.SliceLayout(0, OUT)), 0)
    n = gl.program_id(0) * ROW_TILES * 16 + place_n
    rows = load_rows(w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr, n, N, HAS_BIAS, GROUPED=False)
    for r in gl.static_range(ROWS):
        # nothing is asked of memory across the barriers of a conversion unless it stands before
        ahead_n = n + WARPS_N * 16
        ahead_rows = load_rows(
            w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr, ahead_n, N, HAS_BIAS, GROUPED=False
        )
        # [n tile, m tile, g, t, r, e, half] -> [m tile, half, t, e, n tile, r, g]
        acc = gl.reshape(
            gl.join(accs[2 * r], accs[2 * r + 1]), [WARPS_N, COLUMN_TILES, 8, 4, 2, 2, 2]
        )
        total = gl.reshape(
            gl.permute(acc, [1, 6, 3, 5, 0, 4, 2]), [COLUMN_TILES * 16, WARPS_N * 16]
        )
        total = correct(gl.convert_layout(total, OUT), rows, tokens, K, MULTIPLIER)
        out = scale(total, rows, tokens, HAS_BIAS)
        ptrs = out_ptr + m.to(gl.int64) * stride_om + n
        gl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(m < M) & (n < N))
        n, rows = ahead_n, ahead_rows


@gluon.jit
def _allocate(COPIES: gl.constexpr, TILES: gl.constexpr):
    """Return memory of its own for every copy: where two may meet, Triton adds a barrier."""
    # fragment order has no bank conflicts: nothing to swizzle
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tiles = ()
    for _ in gl.static_range(COPIES):
        tile = gl.allocate_shared_memory(gl.int32, [TILES, 32, 4], SHARED)
        tiles += (tile,)  # type: ignore[assignment]  # Triton's tuples grow
    return tiles


@gluon.jit
def _add_chunk(
    accs, w_shared, x_shared, w_ptrs, x_ptrs, mask_w, mask_x, stride_wk, stride_wp, stride_xk,
    ahead, B,
    SLOT: gl.constexpr, FREE: gl.constexpr, DOWN: gl.constexpr,
    P: gl.constexpr, Q: gl.constexpr, STEPS: gl.constexpr, WARPS_N: gl.constexpr,
    ROWS: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Add the products of the chunk in slot SLOT, level by level, and fetch chunk `ahead`."""
    LAST: gl.constexpr = P + Q - 2
    BITS: gl.constexpr = 1 if DOWN else 31
    x = _load_planes(x_shared, x_shared, SLOT, LAST if DOWN else 0, DOWN, 1, P, Q, STEPS, ROW)
    for i in gl.static_range(LAST + 1):
        ahead_x = x
        for r in gl.static_range(ROWS):
            if r == ROWS - 1 and i < LAST:
                ahead_x = _load_planes(
                    x, x_shared, SLOT, LAST - i - 1 if DOWN else i + 1, DOWN, 0,
                    P, Q, STEPS, ROW,
                )  # fmt: skip
            accs = _add_level(
                accs, x, w_shared, SLOT, LAST - i if DOWN else i, r,
                BITS if (i < LAST if r > 0 else i > 0) else 0, P, Q, STEPS, WARPS_N, ROWS, ROW,
            )  # fmt: skip
            # in the shadow of products; steps beyond B come as zeros and add nothing
            if i == 0:
                _fetch(
                    w_shared, x_shared, w_ptrs, x_ptrs, mask_w, mask_x, stride_wk, stride_wp,
                    stride_xk, ahead, B, FREE, r, ROWS, P, Q, STEPS,
                )  # fmt: skip
        x = ahead_x
    return accs


@gluon.jit
def _add_level(
    accs, x, w_shared,
    SLOT: gl.constexpr, LEVEL: gl.constexpr, R: gl.constexpr, BITS: gl.constexpr,
    P: gl.constexpr, Q: gl.constexpr, STEPS: gl.constexpr, WARPS_N: gl.constexpr,
    ROWS: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Add to row R a chunk's products of all planes a + b = LEVEL, unshifted.

    Meanwhile the row before, whose level is complete, is rotated by BITS, if not 0.
    """
    FIRST: gl.constexpr = LEVEL - Q + 1 if LEVEL >= Q else 0
    OTHER: gl.constexpr = (R + ROWS - 1) % ROWS
    if ROWS == 1 and BITS > 0:
        accs = (_rotate(accs[0], BITS), _rotate(accs[1], BITS))
    acc0, acc1 = accs[2 * R], accs[2 * R + 1]
    other0, other1 = accs[2 * OTHER], accs[2 * OTHER + 1]
    for i in gl.static_range(STEPS * P):
        if LEVEL - i % P >= 0 and LEVEL - i % P < Q:
            tile = w_shared[SLOT * STEPS * P + i].slice(R * WARPS_N, WARPS_N)
            w = gl.expand_dims(tile.load(gl.SliceLayout(1, ROW)), 1)
            plane = x[i // P * Q + LEVEL - i % P]
            if ROWS > 1 and BITS > 0 and i % P == FIRST and i // P < 2:
                acc0, other0 = _bmma_and_rotate(
                    w, plane, acc0, other0, 0, BITS, 2 * (i // P) if STEPS > 1 else 4
                )
                acc1, other1 = _bmma_and_rotate(
                    w, plane, acc1, other1, 1, BITS, 2 * (i // P) if STEPS > 1 else 4
                )
            else:
                acc0 = bmma(w, plane, acc0, 0)
                acc1 = bmma(w, plane, acc1, 1)
    if ROWS > 1:
        accs = _replace(accs, OTHER, other0, other1, ROWS)
    return _replace(accs, R, acc0, acc1, ROWS)


@gluon.jit
def _replace(accs, R: gl.constexpr, acc0, acc1, ROWS: gl.constexpr):
    changed = ()
    for r in gl.static_range(ROWS):
        if r == R:
            changed += (acc0, acc1)  # type: ignore[assignment]  # Triton's tuples grow
        else:
            changed += (accs[2 * r], accs[2 * r + 1])  # type: ignore[assignment]
    return changed


@gluon.jit
def _load_planes(
    x, x_shared, SLOT: gl.constexpr, LEVEL: gl.constexpr, DOWN: gl.constexpr, ALL: gl.constexpr,
    P: gl.constexpr, Q: gl.constexpr, STEPS: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Return ALL planes of a chunk's tokens that LEVEL needs, or x and the plane new to LEVEL."""
    NEW: gl.constexpr = LEVEL - P + 1 if DOWN else LEVEL
    planes = ()
    for i in gl.static_range(STEPS * Q):
        if (i % Q <= LEVEL and LEVEL - i % Q < P) if ALL else i % Q == NEW:
            plane = x_shared[SLOT * STEPS * Q + i].load(gl.SliceLayout(0, ROW))
            planes += (gl.expand_dims(plane, 0),)  # type: ignore[assignment]  # Triton's tuples grow
        else:
            planes += (x[i],)  # type: ignore[assignment]
    return planes


@gluon.jit
def _fetch(
    w_shared, x_shared, w_ptrs, x_ptrs, mask_w, mask_x, stride_wk, stride_wp, stride_xk, chunk, B,
    SLOT: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr,
    P: gl.constexpr, Q: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Start a part of the copies of one chunk of K; what the masks leave out becomes zero."""
    for i in gl.static_range(PART, STEPS * P, PARTS):
        k = chunk * STEPS + i // P
        ptrs = w_ptrs + k * stride_wk + i % P * stride_wp
        _copy_async(w_shared[SLOT * STEPS * P + i], ptrs, mask=mask_w & (k < B))
    for i in gl.static_range(PART, STEPS * Q, PARTS):
        k = chunk * STEPS + i // Q
        ptrs = x_ptrs + k * stride_xk + i % Q * 128
        _copy_async(x_shared[SLOT * STEPS * Q + i], ptrs, mask=mask_x & (k < B))
    if PART == PARTS - 1:
        async_copy.commit_group()


@gluon.jit
def _bmma_and_rotate(w, x, acc, other, HALF: gl.constexpr, BITS: gl.constexpr, WORDS: gl.constexpr):
    """The same, and between two products words 0, 1 or 2, 3 of `other` rotated; all four at 4."""
    BY: gl.constexpr = ",1;" if BITS == 1 else ",31;"
    LOW: gl.constexpr = "shf.l.wrap.b32 $4,$20,$20" + BY + "shf.l.wrap.b32 $5,$21,$21" + BY
    HIGH: gl.constexpr = "shf.l.wrap.b32 $6,$22,$22" + BY + "shf.l.wrap.b32 $7,$23,$23" + BY
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {$0,$1,$2,$3},{$8,$9,$10,$11},"
        + ("{$14,$15}" if HALF else "{$12,$13}") + ",{$16,$17,$18,$19};"
        + ("mov.b32 $4,$20;mov.b32 $5,$21;" if WORDS == 2 else LOW)
        + ("mov.b32 $6,$22;mov.b32 $7,$23;" if WORDS == 0 else HIGH),
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w, x, acc, other], dtype=(gl.int32, gl.int32), is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _rotate(acc, BITS: gl.constexpr):
    bits = acc.to(gl.uint32, bitcast=True)
    return ((bits << BITS) | (bits >> (32 - BITS))).to(gl.int32, bitcast=True)
