"""The Gluon code of `kernels.half_decode`: the formula, the numbers and the legend are there.

A tile is ``[WARPS, ROW_TILES, 32, 4]``, lane and word last. With lane = 4 g + t, a lane holds 16
bytes of row g and 16 of row g + 8, the t-th of four units of a run, and of token g the columns that
these stand for: what the tensor core wants of a lane, as the order of K is free. Lane and word of
a product are row g + 8 (word / 2) and token 2 t + word % 2.

Gluon fixes which lane holds which element, so that an instruction of a whole warp may stand in
inline assembly: `pack=4` hands it the four words of a lane. Nothing here has an interpreter; tests
run it on NumPy and read the machine code.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["half_decode_kernel"]

AND_XOR = 0x6A
"""Truth table of ``(a & b) ^ c``."""


@gluon.jit
def half_decode_kernel(
    x_ptr, stride_xm,
    w0_ptr, w1_ptr, w2_ptr, run_words,
    w_scale_ptr, w_zero_ptr, zero_codes_ptr,
    bias_ptr,
    out_ptr, stride_om,
    M, N, K,
    F0: gl.constexpr,
    F1: gl.constexpr,
    F2: gl.constexpr,
    MULTIPLIER: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_HALF: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    G: gl.constexpr,
    COLUMNS: gl.constexpr,
    EVEN_K: gl.constexpr,
    ROW_TILES: gl.constexpr,
    WARPS: gl.constexpr,
    STEPS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """One CTA: 16 ROW_TILES outputs of every token, steps of 512 columns shared by its warps."""
    UNITS: gl.constexpr = COLUMNS // 128
    SLOTS: gl.constexpr = STEPS * WARPS
    TURNS: gl.constexpr = (UNITS + 4 * SLOTS - 1) // (4 * SLOTS)
    EVEN: gl.constexpr = TURNS * SLOTS * 4 == UNITS
    FULL: gl.constexpr = gl.BlockedLayout(
        [1, ROW_TILES, 1, 4], [1, 1, 32, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0]
    )
    _control("griddepcontrol.launch_dependents; // $0", PDL)
    warp = _axis(WARPS, FULL, 1, 2, 3)
    tile = _axis(ROW_TILES, FULL, 0, 2, 3)
    lane = _axis(32, FULL, 0, 1, 3)
    word = _axis(4, FULL, 0, 1, 2)
    first_row = gl.program_id(0).to(gl.int64) * (16 * ROW_TILES)
    # a CTA's rows lie inside one block of BLOCK_ROWS rows
    in_block = (first_row % BLOCK_ROWS).to(gl.int32) + tile * 16 + lane // 4
    w_offs = in_block * (G // 4) + word
    run = first_row // BLOCK_ROWS * (BLOCK_ROWS * (G // 4))
    w_ptrs = (w0_ptr + run * F0, w1_ptr + run * F1, w2_ptr + run * F2)
    n = first_row + tile * 16 + lane // 4 + 8 * (word // 2)
    scale_ptrs = w_scale_ptr + n * (GROUPS // 4 if GROUPS > 1 else 1)
    zero_ptrs = zero_codes_ptr + n * (GROUPS // 4 if GROUPS > 1 else 1)
    unit = 4 * warp + lane % 4

    data = _load_turn(
        w_ptrs, w_offs, run_words, scale_ptrs, zero_ptrs, unit,
        F0, F1, F2, GROUPS, BLOCK_ROWS, G, UNITS, WARPS, STEPS, EVEN,
    )  # fmt: skip
    rows = _load_rows(scale_ptrs, w_zero_ptr, bias_ptr, n, N, HAS_BIAS, GROUPS)
    _control("griddepcontrol.wait; // $0", PDL)
    # columns of the product beyond the last token repeat it and are not stored
    token = gl.minimum(lane // 4, M - 1)
    x_ptrs = x_ptr + token.to(gl.int64) * stride_xm + word

    zero = gl.full([WARPS, ROW_TILES, 32, 4], 0.0, gl.float32, FULL)
    x_zero = gl.full([WARPS, 1, 32, 4], 0.0, gl.float32, FULL)
    total = zero
    sums = (x_zero,) * 4
    chains = ((zero,) * 4, (zero,) * 4, (zero,) * 4)
    for turn in range(TURNS):
        held = data
        here = unit + turn * (4 * SLOTS)
        if TURNS > 1:
            data = _load_turn(
                w_ptrs, w_offs, run_words, scale_ptrs, zero_ptrs, here + 4 * SLOTS,
                F0, F1, F2, GROUPS, BLOCK_ROWS, G, UNITS, WARPS, STEPS, EVEN=False,
            )  # fmt: skip
        for step in gl.static_range(STEPS):
            words = _words_of(held, step, F0 + F1 + F2)
            at = here + 4 * WARPS * step
            if GROUPS > 1:
                total += _sum_groups(
                    words, held[-2 * STEPS + 2 * step], held[-2 * STEPS + 2 * step + 1], x_ptrs,
                    at, K, zero, x_zero, F0, F1, F2, IS_HALF, G, UNITS, EVEN, EVEN_K,
                )  # fmt: skip
            else:
                sums, chains = _add_slices(
                    sums, chains, words, x_ptrs, at, K, 0, 8,
                    F0, F1, F2, IS_HALF, G, UNITS, EVEN, EVEN_K,
                )  # fmt: skip
    if GROUPS == 1:
        offset = rows[1] + MULTIPLIER * (128 if F0 == 8 else 0)
        total = MULTIPLIER * _joined(chains, F0, F1, F2, IS_HALF)
        total = (total - offset.to(gl.float32) * _joined_tokens(sums)) * rows[0]
    y = gl.expand_dims(gl.sum(total, 0), 0)
    y = y + rows[2] if HAS_BIAS else y
    m = 2 * (lane % 4) + word % 2
    ptrs = out_ptr + m.to(gl.int64) * stride_om + n
    gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@gluon.jit
def _load_turn(
    w_ptrs, w_offs, run_words, scale_ptrs, zero_ptrs, first_unit,
    F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr, G: gl.constexpr, UNITS: gl.constexpr, WARPS: gl.constexpr,
    STEPS: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Load rows g and g + 8 of every run and step, then scales and zero-points of every step."""
    RUN: gl.constexpr = BLOCK_ROWS * (G // 4)
    data = ()
    for step in gl.static_range(STEPS):
        unit = first_unit + 4 * WARPS * step
        kb = unit // (G // 16)
        within = w_offs + unit % (G // 16) * 4
        for r in gl.static_range(F0 + F1 + F2):
            if r < F0:
                ptrs = w_ptrs[0] + (kb * (run_words * F0) + within + r * RUN)
            elif r < F0 + F1:
                ptrs = w_ptrs[1] + (kb * (run_words * F1) + within + (r - F0) * RUN)
            else:
                ptrs = w_ptrs[2] + (kb * (run_words * F2) + within + (r - F0 - F1) * RUN)
            for half in gl.static_range(2):
                at = ptrs + half * (8 * (G // 4))
                if EVEN:
                    data += (gl.load(at, eviction_policy="evict_first"),)  # type: ignore[assignment]  # Triton's tuples grow
                else:
                    data += (  # type: ignore[assignment]  # as above
                        gl.load(at, mask=unit < UNITS, other=0, eviction_policy="evict_first"),
                    )
    if GROUPS > 1:
        data += _load_groups(scale_ptrs, zero_ptrs, first_unit, G, UNITS, WARPS, STEPS)
    return data


@gluon.jit
def _load_groups(
    scale_ptrs, zero_ptrs, first_unit, G: gl.constexpr, UNITS: gl.constexpr, WARPS: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """Load scales and zero-points of the four groups of a block, which lie beside each other."""
    data = ()
    for step in gl.static_range(STEPS):
        kb = gl.minimum(first_unit + 4 * WARPS * step, UNITS - 1) // (G // 16)
        data += (gl.load(scale_ptrs + kb), gl.load(zero_ptrs + kb))  # type: ignore[assignment]  # Triton's tuples grow
    return data


@gluon.jit
def _load_rows(
    scale_ptrs, w_zero_ptr, bias_ptr, n, N, HAS_BIAS: gl.constexpr, GROUPS: gl.constexpr
):
    """Load what a row needs at the end: scale, zero-point, bias; with groups, a turn brings it."""
    scale, zero, bias = n, n, n
    if GROUPS == 1:
        scale = gl.load(scale_ptrs).to(gl.float32)
        zero = gl.load(w_zero_ptr + n)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    return scale, zero, bias


@gluon.jit
def _words_of(data, STEP: gl.constexpr, RUNS: gl.constexpr):
    words = ()
    for i in gl.static_range(2 * RUNS):
        words += (data[STEP * 2 * RUNS + i],)  # type: ignore[assignment]  # Triton's tuples grow
    return words


@gluon.jit
def _load_tokens(
    x_ptrs, unit, K, S: gl.constexpr, G: gl.constexpr, UNITS: gl.constexpr,
    EVEN: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """Load 4 x 4 columns of slice S, even columns of a word before odd ones."""
    at = unit // (G // 16) * (2 * G) + unit % (G // 16) * 4 + S * (G // 4)
    ptrs = x_ptrs + at
    if EVEN and EVEN_K:
        x = gl.load(ptrs, eviction_policy="evict_last")
    else:
        # whole units are beyond K or none of their columns is
        x = gl.load(ptrs, mask=(unit < UNITS) & (at * 4 < K), other=0, eviction_policy="evict_last")
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b, c, d; mov.b64 {a, b}, $1; prmt.b32 c, a, b, 0x5410; "
        "prmt.b32 d, a, b, 0x7632; mov.b64 $0, {c, d}; }",
        "=l,l", [x], dtype=gl.int64, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _sum_groups(
    words, scales, zeros, x_ptrs, unit, K, zero, x_zero,
    F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, IS_HALF: gl.constexpr, G: gl.constexpr,
    UNITS: gl.constexpr, EVEN: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """Scale the product of each of the four groups of a block, two slices a group."""
    total = zero
    for part in gl.static_range(4):
        sums, chains = _add_slices(
            (x_zero,) * 4, ((zero,) * 4, (zero,) * 4, (zero,) * 4), words, x_ptrs, unit, K,
            2 * part, 2, F0, F1, F2, IS_HALF, G, UNITS, EVEN, EVEN_K,
        )  # fmt: skip
        product, x_sum = _joined(chains, F0, F1, F2, IS_HALF), _joined_tokens(sums)
        scale = (scales >> (16 * part)).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        offset = ((zeros >> (8 * part)) & 255).to(gl.float32)
        total += (product - offset * x_sum) * scale
    return total


@gluon.jit
def _add_slices(
    sums, chains, words, x_ptrs, unit, K, FIRST: gl.constexpr, COUNT: gl.constexpr,
    F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, IS_HALF: gl.constexpr, G: gl.constexpr,
    UNITS: gl.constexpr, EVEN: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """Carry on the chains of tokens and of every field by COUNT slices."""
    chains0, chains1, chains2 = chains
    for s in gl.static_range(FIRST, FIRST + COUNT):
        x = _load_tokens(x_ptrs, unit, K, s, G, UNITS, EVEN, EVEN_K)
        sums = _add_tokens(sums, x, s, IS_HALF)
        chains0 = _add_slice(chains0, words, x, s, 0, F0, IS_HALF)
        if F1 > 0:
            chains1 = _add_slice(chains1, words, x, s, F0, F1, IS_HALF)
        if F2 > 0:
            chains2 = _add_slice(chains2, words, x, s, F0 + F1, F2, IS_HALF)
    return sums, (chains0, chains1, chains2)


@gluon.jit
def _add_slice(
    sums, words, x, S: gl.constexpr, FIRST_RUN: gl.constexpr, F: gl.constexpr,
    IS_HALF: gl.constexpr,
):  # fmt: skip
    """Carry on the chain of slice S modulo 4; those of 8 bits are two fields of four."""
    RUN: gl.constexpr = 2 * (FIRST_RUN + S * F // 8)
    low, high = words[RUN], words[RUN + 1]
    AT: gl.constexpr = S * F % 8
    if F == 8 and not IS_HALF:
        # a bfloat16 has room for a nibble
        first = _product(low, high, x, sums[S % 2], 0, 0, 4, 0, IS_HALF)
        second = _product(low, high, x, sums[2 + S % 2], 4, 0, 4, 8, IS_HALF)
        sums = _replaced(sums, first, S % 2)
        sums = _replaced(sums, second, 2 + S % 2)
    else:
        FLIP: gl.constexpr = 128 if F == 8 else 0
        DOWN: gl.constexpr = 0 if IS_HALF and F > 1 else AT // 4 * 4
        new = _product(low, high, x, sums[S % 4], DOWN, AT - DOWN, F, FLIP, IS_HALF)
        sums = _replaced(sums, new, S % 4)
    return sums


@gluon.jit
def _add_tokens(sums, x, S: gl.constexpr, IS_HALF: gl.constexpr):
    """The same for the sum of the activations: weights of one."""
    ASSEMBLY: gl.constexpr = sum_assembly(IS_HALF)
    new = gl.inline_asm_elementwise(
        ASSEMBLY, "=f,=f,=f,=f,l,l,l,l,f,f,f,f",
        [x, sums[S % 4]], dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip
    return _replaced(sums, new, S % 4)


@gluon.jit
def _replaced(sums, new, AT: gl.constexpr):
    chains = ()
    for i in gl.static_range(4):
        chains += (new if i == AT else sums[i],)  # type: ignore[assignment]  # Triton's tuples grow
    return chains


@gluon.jit
def _joined_tokens(sums):
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


@gluon.jit
def _joined(chains, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, IS_HALF: gl.constexpr):
    """Put the chains of every field in their places, by powers of two."""
    UNIT: gl.constexpr = 2.0**24 if IS_HALF else 1.0
    total = _joined_field(chains[0], UNIT, F0, IS_HALF)
    if F1 > 0:
        total += _joined_field(chains[1], UNIT * 2**F0, F1, IS_HALF)
    if F2 > 0:
        total += _joined_field(chains[2], UNIT * 2 ** (F0 + F1), F2, IS_HALF)
    return total


@gluon.jit
def _joined_field(sums, UNIT: gl.constexpr, F: gl.constexpr, IS_HALF: gl.constexpr):
    # how many bits up the codes of every chain were
    UP1: gl.constexpr = F % 8 if IS_HALF or F < 4 else 0
    UP2: gl.constexpr = F * 2 % 8 if IS_HALF or F == 1 else 0
    UP3: gl.constexpr = UP1 + UP2 if F < 4 else UP1
    # of 8 bits in two products the last two chains hold the upper nibbles
    NIBBLE: gl.constexpr = 16 if F == 8 and not IS_HALF else 1
    total = sums[0] * UNIT + sums[1] * (UNIT / 2**UP1)
    return total + (sums[2] * (UNIT / 2**UP2 * NIBBLE) + sums[3] * (UNIT / 2**UP3 * NIBBLE))


@gluon.jit
def _product(
    low, high, x, acc, DOWN: gl.constexpr, AT: gl.constexpr, F: gl.constexpr, FLIP: gl.constexpr,
    IS_HALF: gl.constexpr,
):  # fmt: skip
    """Return acc + the product of a field, F bits at AT of every byte when DOWN are shifted out."""
    ASSEMBLY: gl.constexpr = product_assembly(AT, F, FLIP, IS_HALF)
    return gl.inline_asm_elementwise(
        ASSEMBLY, "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,l,l,l,l,f,f,f,f",
        [low >> DOWN, low >> (DOWN + 8), high >> DOWN, high >> (DOWN + 8), x, acc],
        dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@triton.constexpr_function
def product_assembly(at: int, bits: int, flip: int, is_half: bool) -> str:  # noqa: FBT001  known at compile time
    """Write four products of 16 rows, 16 columns and 8 tokens, of one word of a lane each.

    Registers: 4 low even, 8 low odd, 12 high even, 16 high odd, 20 tokens, 24 sums.
    """
    mask = (((1 << bits) - 1) << at) * 0x00010001
    # masked bits are a subnormal float16, exact in the tensor core; for a bfloat16 they are put
    # behind 128, which is taken off again
    changed = (flip + (0 if is_half else 0x4300)) * 0x00010001
    text = "{ .reg .b32 a0, a1, a2, a3, b0, b1; "
    if not is_half:
        text += ".reg .b32 one, less; mov.b32 one, 0x3f803f80; mov.b32 less, 0xc300c300; "
    for v in range(4):
        for i, word in enumerate((4, 12, 8, 16)):
            if changed:
                text += f"lop3.b32 a{i}, ${word + v}, {mask}, {changed}, {AND_XOR}; "
            else:
                text += f"and.b32 a{i}, ${word + v}, {mask}; "
            if not is_half:
                text += f"fma.rn.bf16x2 a{i}, a{i}, one, less; "
        text += f"mov.b64 {{b0, b1}}, ${20 + v}; " + _multiply(is_half, 24 if v == 0 else 0)
    return text + "}"


@triton.constexpr_function
def sum_assembly(is_half: bool) -> str:  # noqa: FBT001  known at compile time
    """Write the same for weights of one. Registers: 4 tokens, 8 sums."""
    text = "{ .reg .b32 a0, a1, a2, a3, b0, b1; "
    for i in range(4):
        text += f"mov.b32 a{i}, {0x3C003C00 if is_half else 0x3F803F80}; "
    for v in range(4):
        text += f"mov.b64 {{b0, b1}}, ${4 + v}; " + _multiply(is_half, 8 if v == 0 else 0)
    return text + "}"


@triton.constexpr_function
def _multiply(is_half: bool, sums: int) -> str:  # noqa: FBT001  known at compile time
    kind = "f16" if is_half else "bf16"
    inputs = ",".join(f"${sums + i}" for i in range(4))
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}},{{a0,a1,a2,a3}},{{b0,b1}},{{{inputs}}}; "
    )


@gluon.jit
def _control(ASSEMBLY: gl.constexpr, PDL: gl.constexpr):
    """Let the kernel that follows start, or wait for the one before and what it wrote."""
    if PDL:
        gl.inline_asm_elementwise(ASSEMBLY, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _axis(
    SIZE: gl.constexpr, LAYOUT: gl.constexpr,
    A0: gl.constexpr, A1: gl.constexpr, A2: gl.constexpr,
):  # fmt: skip
    """Count along the axis of a 4-d layout that is none of A0 < A1 < A2."""
    layout: gl.constexpr = gl.SliceLayout(A0, gl.SliceLayout(A1, gl.SliceLayout(A2, LAYOUT)))
    index = gl.expand_dims(gl.arange(0, SIZE, layout), A0)
    return gl.expand_dims(gl.expand_dims(index, A1), A2)
