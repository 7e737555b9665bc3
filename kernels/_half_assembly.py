"""Assembly of `kernels._half_decode_kernel`: products of 16 rows by 8 tokens of masked bits.

    float16     bits in place, subnormal          bfloat16     128 + bits, less 128

Registers are named where they are used; lanes are those of ``mma.m16n8k16`` in the PTX manual.
"""

import triton

__all__ = ["product_assembly", "sum_assembly"]

AND_XOR = 0x6A
"""Truth table of ``(a & b) ^ c``."""


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
