"""Codes of layout R as numbers of 16 bits, two to an instruction.

Two neighbouring bytes of a run are one lane of 16 bits, as wide as an element of the product: its
low byte holds an even column and its high byte the odd one. The codes become numbers less the
middle code, 0 for signed bytes; at most 8 bits, exact in both types.

    float16    1024 + u = 0x6400 | u         bfloat16    128 + u = 0x4300 | u for u < 128
    bfloat16, signed bytes of 7 bits and a sign b:  (128 + b) - (sign ? 256 : 128)
"""

import triton
import triton.language as tl

from kernels.field_codes import move_field

__all__ = ["centred_assembly", "centred_codes"]

EVERY_LANE = 0x00010001


@triton.jit
def centred_codes(
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
        [w0, w1 if F1 > 0 else w0, w2 if F2 > 0 else w0],
        dtype=tl.float16 if IS_HALF else tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.constexpr_function
def centred_assembly(f0: int, f1: int, f2: int, s: int, odd: int, is_half: bool) -> str:  # noqa: FBT001  known at compile time
    """Write the assembly of `centred_codes`: fields gathered in u, made numbers, the middle off."""
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
    return f"{{ .reg .b32 t, u, c; {moves}{ending} }}"
