"""Codes from the fields of layout R, four to an instruction, for the kernels that read it.

    field i of byte b  =  (b >> f i) & (2^f - 1)        code = sum_fields field << (lower bits)

A field moves straight to its place in the code: one shift by the difference and one mask, and bits
of a neighbouring byte that slip in are masked away. The mask and the union of two fields are one
instruction of the machine.
"""

import triton
import triton.language as tl

__all__ = ["join_fields"]


@triton.jit
def join_fields(
    w0, w1, w2,
    S: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Return the int8 codes of slice S from the bytes of the runs that hold its fields.

    w0, w1, w2 are uint8 tiles of one shape, F0 >= F1 >= F2 the bits of their fields, 0 where a
    code has fewer. A single field of 8 bits holds signed bytes.
    """
    if F0 == 8:
        return w0.to(tl.int8, bitcast=True)
    code = _place(w0, S % (8 // F0), F0, 0, INTERP)
    if F1 > 0:
        code = _join(code, w1, S * F1 % 8 // F1, F1, F0, INTERP)
    if F2 > 0:
        code = _join(code, w2, S * F2 % 8 // F2, F2, F0 + F1, INTERP)
    return code


@triton.jit
def _place(w, POSITION: tl.constexpr, FIELD: tl.constexpr, UP: tl.constexpr, INTERP: tl.constexpr):
    """Move the field at a position of every byte to bits UP and above, and clear the rest."""
    SHIFT: tl.constexpr = FIELD * POSITION - UP
    MASK: tl.constexpr = ((1 << FIELD) - 1) << UP
    if INTERP:
        moved = w >> SHIFT if SHIFT > 0 else w << -SHIFT
        return (moved & MASK).to(tl.int8)
    WORD: tl.constexpr = MASK * 0x01010101
    SHIFTED: tl.constexpr = f"shr.b32 t, $1, {SHIFT};" if SHIFT > 0 else f"shl.b32 t, $1, {-SHIFT};"
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; {SHIFTED} and.b32 $0, t, {WORD}; }}",
        "=r,r",
        [w],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _join(
    code, w,
    POSITION: tl.constexpr,
    FIELD: tl.constexpr,
    UP: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Add one more field to codes whose bits from UP on are clear."""
    SHIFT: tl.constexpr = FIELD * POSITION - UP
    MASK: tl.constexpr = ((1 << FIELD) - 1) << UP
    if INTERP:
        return code | _place(w, POSITION, FIELD, UP, INTERP)
    WORD: tl.constexpr = MASK * 0x01010101
    SHIFTED: tl.constexpr = f"shr.b32 t, $2, {SHIFT};" if SHIFT > 0 else f"shl.b32 t, $2, {-SHIFT};"
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; {SHIFTED} and.b32 t, t, {WORD}; or.b32 $0, $1, t; }}",
        "=r,r,r",
        [code, w],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )
