"""Codes from the fields of layout R, four to an instruction, for the kernels that read it.

    field i of byte b  =  (b >> f i) & (2^f - 1)        code = sum_fields field << (lower bits)

A field moves straight to its place in the code: one shift by the difference and one mask, and bits
of a neighbouring byte that slip in are masked away. The mask and the union of two fields are one
instruction of the machine.
"""

import triton
import triton.language as tl

__all__ = ["centre_assembly", "hold_run", "join_assembly", "join_fields", "move_field"]

EVERY_BYTE = 0x01010101
EVERY_SIGN = 0x80808080


@triton.jit
def hold_run(held, run_ptr, offs, S: tl.constexpr, FIELD: tl.constexpr):
    """Load the run of a field that slice S begins, else keep the one at hand."""
    run = held
    if FIELD > 0 and S * FIELD % 8 == 0:
        run = tl.load(run_ptr + offs)
    return run


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
    code has fewer and the tile is not looked at. A single field of 8 bits holds signed bytes.
    """
    if F0 == 8:
        return w0.to(tl.int8, bitcast=True)
    elif INTERP:
        code = (w0 >> (S * F0 % 8)) & ((1 << F0) - 1)
        if F1 > 0:
            code |= ((w1 >> (S * F1 % 8)) & ((1 << F1) - 1)) << F0
        if F2 > 0:
            code |= ((w2 >> (S * F2 % 8)) & ((1 << F2) - 1)) << (F0 + F1)
        return code.to(tl.int8)
    else:
        ASSEMBLY: tl.constexpr = join_assembly(F0, F1, F2, S)
        return tl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,r,r,r",
            [w0, w1 if F1 > 0 else w0, w2 if F2 > 0 else w0],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.constexpr_function
def join_assembly(f0: int, f1: int, f2: int, s: int) -> str:
    """Write the assembly of `join_fields` for one slice."""
    moves = _move_fields(f0, f1, f2, s, 0)
    return f"{{ .reg .b32 t, u; {moves}mov.b32 $0, u; }}"


@triton.constexpr_function
def centre_assembly(f0: int, f1: int, f2: int, s: int, multiplier: int) -> str:
    """Write assembly that yields ``multiplier code - z`` as int8, four to an instruction.

    Operands 1..3 are the bytes of the fields, operand 4 holds ``128 - z`` in every byte. No sum
    leaves its byte where ``multiplier code - z`` fits int8, and flipping the top bit takes the 128
    away again.
    """
    moves = _move_fields(f0, f1, f2, s, multiplier - 1)
    centre = f"add.u32 u, u, $4; xor.b32 $0, u, {EVERY_SIGN}; "
    return f"{{ .reg .b32 t, u; {moves}{centre}}}"


@triton.constexpr_function
def _move_fields(f0: int, f1: int, f2: int, s: int, up: int) -> str:
    """Write the assembly that leaves the codes of one slice in u, `up` bits above the lowest."""
    moves = move_field(0, s * f0 % 8, f0, up, EVERY_BYTE)
    if f1:
        moves += move_field(1, s * f1 % 8, f1, f0 + up, EVERY_BYTE)
    if f2:
        moves += move_field(2, s * f2 % 8, f2, f0 + f1 + up, EVERY_BYTE)
    return str(moves)


@triton.constexpr_function
def move_field(i: int, at: int, bits: int, up: int, lanes: int) -> str:
    """Write assembly that adds field i to the codes in u, from bit `at` to bit `up` of every lane.

    The first field starts u. `lanes` has the lowest bit of every lane set.
    """
    word = f"${i + 1}"
    shifted = at - up
    move = f"shr.b32 t, {word}, {shifted}; " if shifted >= 0 else f"shl.b32 t, {word}, {-shifted}; "
    mask = (((1 << bits) - 1) << up) * lanes
    if i == 0:
        return f"{move}and.b32 u, t, {mask}; "
    return f"{move}and.b32 t, t, {mask}; or.b32 u, u, t; "
