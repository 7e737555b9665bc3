"""Packed keys and values in registers: fields of 16-bit words to float16.

A word holds two bytes of a row of `kernels.kv_pages`, hence 16 / F codes. In float16, 1024 and a
field in place are one bitwise operation, and one fused product and sum moves the field down and
takes away 1024 and the middle code, exactly: two instructions for two codes.

Field i of word j, i = 0 .. 16/F - 1, is dim 2 j + i // (8/F) + (i % (8/F)) C with C bytes in a row.
"""

import triton
import triton.language as tl

__all__ = ["dot", "field_dims", "unpack_field", "unpack_tile"]


@triton.jit
def unpack_field(
    words, INDEX: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, INTERP: tl.constexpr
):
    """Turn one field of int16 words into float16 codes less ``2^(BITS - 1)``."""
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    if INTERP:
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
    PER_BYTE: tl.constexpr = 8 // FIELD
    whole = _unpack_bytes(words, 0, FIELD, BITS, INTERP)
    if PER_BYTE == 2:
        whole = _join(whole, _unpack_bytes(words, 1, FIELD, BITS, INTERP))
    if PER_BYTE == 4:
        whole = _join(whole, _unpack_bytes(words, 1, FIELD, BITS, INTERP))
        upper = _unpack_bytes(words, 2, FIELD, BITS, INTERP)
        upper = _join(upper, _unpack_bytes(words, 3, FIELD, BITS, INTERP))
        whole = _join(whole, upper)
    return whole


@triton.jit
def tile_dims(columns, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """Give the dim of a column of `unpack_tile`, WIDTH words in a row; HEAD_DIM or more: none."""
    if FIELD == 4:
        byte, part = columns // 2, columns % 2
    elif FIELD == 2:
        byte, part = columns // 4, columns % 2 * 2 + columns // 2 % 2
    else:
        byte, part = columns, columns * 0
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
def _unpack_bytes(
    words, PART: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, INTERP: tl.constexpr
):
    PER_BYTE: tl.constexpr = 8 // FIELD
    low = unpack_field(words, PART, FIELD, BITS, INTERP)
    return _join(low, unpack_field(words, PER_BYTE + PART, FIELD, BITS, INTERP))


@triton.jit
def _join(a, b):
    """Interleave the columns of two tiles; both lie in the same thread."""
    return tl.join(a, b).reshape(a.shape[0], 2 * a.shape[1])
