"""Packed keys and values in registers: fields of 16-bit words to float16, and what weighs them.

Beside it stand the loads that bring them there.

A word holds two bytes of a row of `kernels.kv_pages`, hence 16 / F codes. In float16, 1024 and a
field in place are one bitwise operation, and one fused product and sum moves the field down and
takes away 1024 and the middle code, exactly: two instructions for two codes.

Field i of word j, i = 0 .. 16/F - 1, is dim 2 j + i // (8/F) + (i % (8/F)) C with C bytes in a row.
"""

import triton
import triton.language as tl

__all__ = [
    "ask_ahead",
    "cap",
    "dot",
    "exp2",
    "field_dims",
    "load_pages",
    "load_scale",
    "load_words",
    "load_zeros",
    "log2",
    "power_below",
    "reciprocal",
    "round_weights",
    "tile_dims",
    "unpack_field",
    "unpack_tile",
    "wait_for_predecessor",
]

# as many as an H100 holds at once, about: those behind have nothing to wait for
FIRST_PROGRAMS = tl.constexpr(512)


@triton.jit
def unpack_field(
    words, INDEX: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, INTERP: tl.constexpr
):
    """Turn one field of int16 words into float16 codes less ``2^(BITS - 1)``; leave 16 bits."""
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    if FIELD == 16:
        return words
    elif INTERP:
        codes = (words.to(tl.int32) >> (INDEX * FIELD)) & ((1 << FIELD) - 1)
        return (codes - CENTRE).to(tl.float16)
    else:
        # the mantissa has ten bits: the upper byte is brought down first
        SHIFT: tl.constexpr = INDEX * FIELD // 8 * 8
        PLACE: tl.constexpr = INDEX * FIELD % 8
        MASK: tl.constexpr = (((1 << FIELD) - 1) << PLACE) * 0x10001
        DOWN: tl.constexpr = ((15 - PLACE) << 10) * 0x10001
        OFFSET: tl.constexpr = (0x8000 + ((25 - PLACE) << 10) + (CENTRE << PLACE)) * 0x10001
        # 1677747200 is 1024 in both halves, 234 is (a & b) | c
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, d, o; shr.b32 t, $1, {SHIFT}; lop3.b32 t, t, {MASK}, 1677747200, 234;"
            f" mov.b32 d, {DOWN}; mov.b32 o, {OFFSET}; fma.rn.f16x2 $0, t, d, o; }}",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def unpack_tile(words, FIELD: tl.constexpr, BITS: tl.constexpr, INTERP: tl.constexpr):
    """Unpack int16 ``[T, W]`` into float16 ``[T, W * 16 / FIELD]``; for the order, `tile_dims`."""
    if FIELD == 16:
        return words
    elif FIELD == 8:
        return _unpack_bytes(words, 0, FIELD, BITS, INTERP)
    elif FIELD == 4:
        return _unpack_two(words, 0, FIELD, BITS, INTERP)
    else:
        lower = _unpack_two(words, 0, FIELD, BITS, INTERP)
        return _join(lower, _unpack_two(words, 2, FIELD, BITS, INTERP))


@triton.jit
def tile_dims(columns, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """Give the dim of a column of `unpack_tile`, WIDTH words in a row; HEAD_DIM or more: none."""
    if FIELD == 16:
        return columns
    else:
        PARTS: tl.constexpr = 8 // FIELD
        byte, part = columns // PARTS, columns % PARTS
        if PARTS == 4:
            # the last join put its two sides into the lowest bit
            part = part % 2 * 2 + part // 2
        # columns of padding words must not fall on the dims of another part
        return tl.where(byte < 2 * WIDTH, byte + part * (2 * WIDTH), 1 << 20)


@triton.jit
def field_dims(words, INDEX: tl.constexpr, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """Give the dims that field INDEX of some words holds; 16 bits are a field of their own."""
    if FIELD == 16:
        return words
    else:
        PER_BYTE: tl.constexpr = 8 // FIELD
        return 2 * words + INDEX // PER_BYTE + INDEX % PER_BYTE * 2 * WIDTH


@triton.jit
def dot(a, b, acc, INTERP: tl.constexpr):
    """Multiply matrices; the interpreter gets bfloat16 wrong."""
    if INTERP:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def load_pages(table_row, t, end, PAGE: tl.constexpr):
    """Load the pages of some tokens; those beyond the end read page 0 and weigh nothing."""
    # without a sign, pages are a shift away
    page_ptrs = table_row + t.to(tl.uint32) // PAGE
    return tl.load(page_ptrs, mask=t < end, other=0, cache_modifier=".cg").to(tl.int64)


@triton.jit
def ask_ahead(
    codes_ptr, scale_ptr, zero_ptr, table_row, page, kv_head, t, end,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Ask for keys and values of the first tiles, up to the L2 cache."""
    # words of 32 bytes, what memory gives at least
    SECTOR: tl.constexpr = 16
    SECTORS: tl.constexpr = (WIDTH + SECTOR - 1) // SECTOR
    offs_s = tl.minimum(tl.arange(0, BLOCK_W // SECTOR), SECTORS - 1) * SECTOR
    if AHEAD > 0 and _program_number() < FIRST_PROGRAMS:
        pages = (page,)
        for tile in tl.static_range(1, AHEAD):
            pages += (load_pages(table_row, t + tile * t.shape[0], end, PAGE),)  # type: ignore[assignment]
        for tile in tl.static_range(AHEAD):
            tokens = t + tile * t.shape[0]
            inside = tokens < end
            pair = (pages[tile] * KV_HEADS + kv_head) * PAGE
            row = 2 * pair + (tokens & (PAGE - 1))
            ptrs = codes_ptr + row[:, None] * WIDTH + offs_s[None, :]
            _prefetch(ptrs, inside[:, None])
            _prefetch(ptrs + PAGE * WIDTH, inside[:, None])
            if BITS < 16:
                _prefetch(scale_ptr + row, inside)
                _prefetch(scale_ptr + row + PAGE, inside)
                _prefetch(zero_ptr + ((pair + (tokens & (PAGE - 1))) >> 1), inside)


@triton.jit
def load_words(codes_ptr, row, inside, offs_w, WIDTH: tl.constexpr, FIELD: tl.constexpr):
    """Load rows of words; what lies in no token's place must be finite, and packed codes are."""
    word_ptrs = codes_ptr + row[:, None] * WIDTH + offs_w[None, :]
    if FIELD == 16:
        return tl.load(word_ptrs, mask=inside[:, None] & (offs_w < WIDTH)[None, :], other=0.0)
    elif offs_w.shape[0] == WIDTH:
        return tl.load(word_ptrs)
    else:
        return tl.load(word_ptrs, mask=(offs_w < WIDTH)[None, :], other=0)


@triton.jit
def load_scale(scale_ptr, row, mask, BITS: tl.constexpr):
    """Load the scales of some rows, float32; those of 16 bits are 1."""
    if BITS == 16:
        return tl.full(row.shape, 1.0, dtype=tl.float32)
    else:
        return tl.load(scale_ptr + row, mask=mask, other=1.0)


@triton.jit
def load_zeros(zero_ptr, pair, t, mask, BITS: tl.constexpr):
    """Load zero-points of keys and values, float32 from the middle code; at 16 bits they are 0."""
    if BITS == 16:
        key = tl.full(pair.shape, 0.0, dtype=tl.float32)
        value = key
    else:
        words = tl.load(zero_ptr + (pair >> 1), mask=mask, other=0) >> ((t & 1) * 16)
        key = ((words & 255) - (1 << (BITS - 1))).to(tl.float32)
        value = (((words >> 8) & 255) - (1 << (BITS - 1))).to(tl.float32)
    return key, value


@triton.jit
def cap(x, soft_cap, HAS_CAP: tl.constexpr, INTERP: tl.constexpr):
    """Take ``soft_cap * tanh(x / soft_cap)`` of scores in powers of two."""
    if HAS_CAP:
        # two to the power of 64 is far beyond where tanh is 1; the scores come times log2 e
        doubled = tl.minimum(x * (2.0 / soft_cap), 64.0)
        x = (soft_cap * 1.4426950408889634) * (1.0 - 2.0 / (exp2(doubled, INTERP) + 1.0))
    return x


@triton.jit
def power_below(largest):
    """Give the power of two that is at most as large, and its inverse; 1 for what is not normal."""
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    # the inverse of the largest powers is not normal either
    usual = (exponent > 0) & (exponent < 0x7E800000)
    exponent = tl.where(usual, exponent, 0x3F800000)
    inverse = 0x7F000000 - exponent
    return exponent.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def round_weights(w, words, FIELD: tl.constexpr):
    """Convert weights to what the values are multiplied in."""
    return w.to(words.dtype) if FIELD == 16 else w.to(tl.float16)


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait for the kernel before, and let the one behind start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def exp2(x, INTERP: tl.constexpr):
    """Take ``2^x`` in one instruction; less than the least normal number gives 0."""
    return tl.exp2(x) if INTERP else _approximate("ex2.approx.ftz.f32 $0, $1;", x)


@triton.jit
def log2(x, INTERP: tl.constexpr):
    """Take the logarithm in one instruction."""
    return tl.log2(x) if INTERP else _approximate("lg2.approx.ftz.f32 $0, $1;", x)


@triton.jit
def reciprocal(x, INTERP: tl.constexpr):
    """Take ``1 / x`` in one instruction."""
    return 1.0 / x if INTERP else _approximate("rcp.approx.ftz.f32 $0, $1;", x)


@triton.jit
def _program_number():
    """Programs start in this order."""
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    return row * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _prefetch(ptrs, mask):
    """Ask for what lies at some addresses, up to the L2 cache; not in the interpreter."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred wanted;
            setp.ne.b32 wanted, $2, 0;
            @wanted prefetch.global.L2 [$1];
            mov.b32 $0, 0;
        }
        """,
        "=r,l,r", [ptrs.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _approximate(ASM: tl.constexpr, x):
    return tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _unpack_bytes(
    words, PART: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, INTERP: tl.constexpr
):
    PER_BYTE: tl.constexpr = 8 // FIELD
    low = unpack_field(words, PART, FIELD, BITS, INTERP)
    return _join(low, unpack_field(words, PER_BYTE + PART, FIELD, BITS, INTERP))


@triton.jit
def _unpack_two(
    words, PART: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, INTERP: tl.constexpr
):
    lower = _unpack_bytes(words, PART, FIELD, BITS, INTERP)
    return _join(lower, _unpack_bytes(words, PART + 1, FIELD, BITS, INTERP))


@triton.jit
def _join(a, b):
    """Interleave the columns of two tiles; both lie in the same thread."""
    return tl.join(a, b).reshape(a.shape[0], 2 * a.shape[1])
