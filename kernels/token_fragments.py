"""Cut quantized tokens into the words that binary tensor cores read.

    u[m,k] = codes[m,k] + 128 at 8 bits, else codes[m,k]
    word[.., lane 4 g + t, 2 c + h] bit i  =  bit b of u[m, 256 s + 128 h + 32 t + i]

where token m, bit b is column 8 c + g of a tile of 16 (`kernels.fragments` tells both orders).

Shape legend: M tokens, L columns of codes, B = ceil(L / 256) steps s, Q bits, Q' columns a token.
"""

import torch
import triton
import triton.language as tl

from kernels.fragments import STEP, TILE, ColumnOrder, FragmentTokens, columns_a_token
from kernels.tokens import BYTE_BITS, BYTE_SHIFT, TokenCodes

__all__ = ["pack_token_fragments"]


def pack_token_fragments(
    tokens: TokenCodes, order: ColumnOrder, out: torch.Tensor | None = None
) -> FragmentTokens:
    """Run the Triton kernel, on a GPU or in the interpreter.

    The reference is `FragmentTokens.from_tokens`.

    Args:
        tokens: M quantized tokens, rows contiguous.
        order: of the columns.
        out: int32 of the shape that `ColumnOrder` tells, contiguous; None allocates it.

    Raises:
        ValueError: if `out` has another shape.
    """
    m, columns = tokens.codes.shape
    steps = triton.cdiv(columns, STEP)
    by_bits = order is ColumnOrder.BITS
    width = columns_a_token(tokens.bits) if by_bits else 1
    tiles = triton.cdiv(m * width, TILE)
    shape = (tiles, steps, 32, 4) if by_bits else (tiles, steps, tokens.bits, 32, 4)
    if out is None:
        out = tokens.codes.new_empty(shape, dtype=torch.int32)
    if out.shape != shape or out.dtype != torch.int32:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, the words are int32 {shape}")
    if m:
        _token_fragments_kernel[(steps, tiles)](
            tokens.codes, tokens.codes.stride(0),
            out,
            m, columns, steps,
            BITS=tokens.bits,
            WIDTH=width,
            SHIFT=BYTE_SHIFT if tokens.bits == BYTE_BITS else 0,
            num_warps=1 if by_bits else 4,
        )  # fmt: skip
    return FragmentTokens(words=out, order=order, tokens=tokens)


@triton.jit
def _token_fragments_kernel(
    codes_ptr, stride_cm,
    out_ptr,
    M, L, steps,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """One program writes one tile of 16 columns and 256 positions; WIDTH is 1 for whole tokens."""
    TOKENS: tl.constexpr = 16 // WIDTH
    PLANES: tl.constexpr = BITS if WIDTH == 1 else 1
    step = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, TOKENS)
    word = tl.arange(0, 8)
    bit = tl.arange(0, 32)
    m = tile * TOKENS + row
    k = step * 256 + word[:, None] * 32 + bit[None, :]
    mask = (m < M)[:, None, None] & (k < L)[None, :, :]
    code = tl.load(codes_ptr + m[:, None, None] * stride_cm + k[None, :, :], mask=mask, other=0)
    code = tl.where(mask, code.to(tl.int32) + SHIFT, 0)
    base = out_ptr + (tile * steps + step) * (PLANES * 128)
    for b in tl.static_range(WIDTH if WIDTH > BITS else BITS):
        # columns of a token beyond its bits come out zero
        words = tl.sum(((code >> b) & 1) << bit[None, None, :], axis=2)
        column = row * WIDTH + (b if WIDTH > 1 else 0)
        lane = (column % 8)[:, None] * 4 + (word % 4)[None, :]
        place = lane * 4 + (column // 8)[:, None] * 2 + (word // 4)[None, :]
        tl.store(base + (0 if WIDTH > 1 else b * 128) + place, words)
