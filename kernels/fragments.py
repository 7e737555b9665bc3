"""Bit-planes in the order in which a binary tensor core takes its operands.

One `mma.m16n8k256` multiplies 16 rows of weight bits by 8 columns of activation bits. A warp's
lane 4 g + t holds, of every 16 x 256 bits, four words; bit i of a word is column 128 h + 32 t + i:

    weights            word 2 h + r      row    g + 8 r
    activations        word 2 c + h      column g + 8 c
    products           word 2 r + e      row    g + 8 r, column 2 t + e       (for either c)

so that one lane's operand is one 128-bit load and no bit is ever moved. Activations come in two
orders of columns: every bit of a token a column (`BITS`, for few tokens: the columns are summed
with weights 2^b at the end), or every token a column and one set of words a bit (`TOKENS`).

Shape legend: N rows of weights, P planes of a weight, M tokens, Q bits of a token, K columns of
256 B; T = ceil(N / 16) row tiles, J column tiles of 16.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import torch

from kernels.layouts import WORD_BITS, unpack_codes
from kernels.tokens import BYTE_BITS, BYTE_SHIFT, TokenCodes

__all__ = [
    "STEP",
    "TILE",
    "ColumnOrder",
    "FragmentTokens",
    "FragmentWeight",
    "columns_a_token",
    "fragment_product",
    "token_fragments",
    "weight_fragments",
    "weight_planes",
]

TILE = 16
"""Rows of a weight tile and columns of an activation tile (two instructions of 8 columns)."""
STEP = 256
"""Columns of K that one instruction multiplies."""
LANES = 32
GROUP = 128


class ColumnOrder(StrEnum):
    """What a column of the activation operand is."""

    BITS = "bits"
    """Bit b of token m is column m Q' + b, with Q' of `columns_a_token`: int32 ``[J, B, 32, 4]``"""
    TOKENS = "tokens"
    """Token m is column m: int32 ``[J, B, Q, 32, 4]``"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentWeight:
    """A weight as binary tensor cores read it."""

    planes: torch.Tensor
    """int32 ``[T, B, P, 32, 4]``."""
    scale: torch.Tensor
    """float16 or float32 ``[S, 16 T]``, zero beyond N."""
    zero_point: torch.Tensor
    """Integer ``[S, 16 T]``: int32 of whole rows; of groups the narrowest type that holds them."""
    sums: torch.Tensor
    """int32 ``[S, 16 T]``: sums of the unsigned codes."""
    in_features: int
    out_features: int
    multiplier: int = 1
    """2 for a half-step grid: w = (2 u - z) s, else w = (u - z) s."""

    @property
    def bits(self) -> int:
        """P."""
        return self.planes.shape[2]

    @classmethod
    def from_stored(
        cls,
        packed: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        in_features: int,
        multiplier: int = 1,
    ) -> Self:
        """Derive the operand from the tensors of a checkpoint.

        Args:
            packed: int32 ``[P, N, W]``, see `kernels.layouts`.
            scale: float16 or float32 ``[N, S]``.
            zero_point: integer ``[N, S]``.
            in_features: K.
            multiplier: see the field.

        Raises:
            ValueError: if groups are not of 128 columns.
        """
        n, groups = scale.shape
        if groups > 1 and groups * GROUP != in_features:
            raise ValueError(
                f"{groups} groups of K = {in_features}: they must hold {GROUP} columns"
            )
        planes = weight_fragments(packed)
        codes_NK = unpack_codes(packed, in_features)
        sums_NS = codes_NK.view(n, groups, -1).sum(-1, dtype=torch.int32)
        padding = planes.shape[0] * TILE - n

        def padded(rows_NS: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(rows_NS.t(), (0, padding)).contiguous()

        return cls(
            planes=planes,
            scale=padded(scale),
            zero_point=padded(zero_point.to(_zero_point_type(zero_point, groups))),
            sums=padded(sums_NS),
            in_features=in_features,
            out_features=n,
            multiplier=multiplier,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentTokens:
    """Quantized tokens as binary tensor cores read them: bits of the unsigned codes."""

    words: torch.Tensor
    """int32, shape by `order`."""
    order: ColumnOrder
    tokens: TokenCodes
    """Where scale, zero-points and sums are, all of the codes as `TokenCodes` shifts them."""

    @classmethod
    def from_tokens(cls, tokens: TokenCodes, order: ColumnOrder) -> Self:
        """Cut codes into bits in plain torch: the reference of `pack_token_fragments`."""
        codes_ML = tokens.codes.to(torch.int16) + (BYTE_SHIFT if tokens.bits == BYTE_BITS else 0)
        words = token_fragments(codes_ML.to(torch.uint8), tokens.bits, order)
        return cls(words=words, order=order, tokens=tokens)


def columns_a_token(bits: int) -> int:
    """Return Q': Q rounded up to 2, 4 or 8, so that no token straddles two instructions."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def weight_fragments(packed_PNW: torch.Tensor) -> torch.Tensor:
    """Reorder stored planes.

    Args:
        packed_PNW: int32 ``[P, N, W]``.

    Returns:
        int32 ``[T, B, P, 32, 4]``, contiguous; rows beyond N and columns beyond K are zero.
    """
    words = _split(_split(_tiled(packed_PNW), 1, (-1, 2, 8)), 4, (-1, 2, 4))
    # [P, T, r, g, B, h, t] -> [T, B, P, g, t, h, r]
    return words.permute(1, 4, 0, 3, 6, 5, 2).flatten(5).flatten(3, 4).contiguous()


def weight_planes(fragments: torch.Tensor, rows: int, words: int) -> torch.Tensor:
    """Undo `weight_fragments`: int32 ``[P, N, W]`` of the first N rows and W words."""
    cut = _split(_split(fragments, 4, (2, 2)), 3, (8, 4))
    planes = cut.permute(2, 0, 6, 3, 1, 5, 4).flatten(4).flatten(1, 3)
    return planes[:, :rows, :words].contiguous()


def token_fragments(codes_ML: torch.Tensor, bits: int, order: ColumnOrder) -> torch.Tensor:
    """Cut unsigned codes into words of one bit each.

    Args:
        codes_ML: uint8 ``[M, L]``.
        bits: Q.
        order: of the columns.

    Returns:
        int32, shape by `order`; columns that stand for nothing are zero.
    """
    m, columns = codes_ML.shape
    padded = torch.nn.functional.pad(codes_ML, (0, -columns % STEP)).to(torch.int64)
    bit = torch.arange(bits, device=codes_ML.device).view(-1, 1, 1)
    bits_QMW = _split((padded >> bit) & 1, 2, (-1, WORD_BITS))
    place = torch.arange(WORD_BITS, device=codes_ML.device)
    # the highest bit is the sign of an int32
    words_QMW = (bits_QMW << place).sum(-1).to(torch.int32)
    if order is ColumnOrder.BITS:
        spread = words_QMW.new_zeros(m, columns_a_token(bits), words_QMW.shape[2])
        spread[:, :bits] = words_QMW.transpose(0, 1)
        return _column_fragments(spread.flatten(0, 1).unsqueeze(0)).squeeze(2)
    return _column_fragments(words_QMW)


def fragment_product(tokens: FragmentTokens, weight: FragmentWeight) -> torch.Tensor:
    """Multiply through the fragment maps alone, instruction by instruction: the kernels' reference.

    Returns:
        int64 ``[M, N]``: sums of products of unsigned codes over all of K.
    """
    bits, m = tokens.tokens.bits, tokens.tokens.codes.shape[0]
    words = tokens.words[:, : weight.planes.shape[1]]
    words = words if tokens.order is ColumnOrder.TOKENS else words.unsqueeze(2)
    rows, columns = _a_operand(weight.planes), _b_operand(words)
    # [T, P, 16, B * 256] x [J, Q, 16, B * 256]: float64 is exact below 2^53
    products = torch.einsum("tprk,jqck->pqjctr", rows, columns).to(torch.int64)
    place = torch.arange(products.shape[0], device=words.device).view(-1, 1, 1, 1, 1, 1)
    sums_QCN = (products << place).sum(0).flatten(3).flatten(1, 2)
    if tokens.order is ColumnOrder.BITS:
        sums_QCN = _split(sums_QCN[0], 0, (-1, columns_a_token(bits))).transpose(0, 1)
    weights = 1 << torch.arange(sums_QCN.shape[0], device=words.device)
    return (sums_QCN * weights.view(-1, 1, 1)).sum(0)[:m, : weight.out_features]


def _zero_point_type(zero_point: torch.Tensor, groups: int) -> torch.dtype:
    if groups == 1:
        return torch.int32
    for narrow in (torch.int8, torch.uint8, torch.int16):
        bounds = torch.iinfo(narrow)
        if bounds.min <= int(zero_point.min()) and int(zero_point.max()) <= bounds.max:
            return narrow
    return torch.int32


def _split(tensor: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """`unflatten`, whose annotation is missing."""
    return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


def _tiled(words_PNW: torch.Tensor) -> torch.Tensor:
    """Pad to whole tiles and steps: ``[P, T * 16, B * 8]``."""
    _, n, words = words_PNW.shape
    return torch.nn.functional.pad(words_PNW, (0, -words % (STEP // WORD_BITS), 0, -n % TILE))


def _column_fragments(words_QCW: torch.Tensor) -> torch.Tensor:
    words = _split(_split(_tiled(words_QCW), 1, (-1, 2, 8)), 4, (-1, 2, 4))
    # [Q, J, c, g, B, h, t] -> [J, B, Q, g, t, c, h]
    return words.permute(1, 4, 0, 3, 6, 2, 5).flatten(5).flatten(3, 4).contiguous()


def _a_operand(fragments: torch.Tensor) -> torch.Tensor:
    """Bits that the instruction takes for its left operand: float64 ``[T, P, 16, B * 256]``."""
    lane = torch.arange(LANES, device=fragments.device)
    seen = fragments.new_zeros(*fragments.shape[:3], TILE, 2, 4)
    for word in range(4):
        seen[..., lane // 4 + 8 * (word % 2), word // 2, lane % 4] = fragments[..., word]
    return _bits(seen)


def _b_operand(fragments: torch.Tensor) -> torch.Tensor:
    """The same of two right operands of 256 x 8: float64 ``[J, Q, 16, B * 256]``."""
    lane = torch.arange(LANES, device=fragments.device)
    seen = fragments.new_zeros(*fragments.shape[:3], TILE, 2, 4)
    for word in range(4):
        seen[..., lane // 4 + 8 * (word // 2), word % 2, lane % 4] = fragments[..., word]
    return _bits(seen)


def _bits(words: torch.Tensor) -> torch.Tensor:
    place = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    bits = (words.unsqueeze(-1) >> place) & 1
    return bits.flatten(4).permute(0, 2, 3, 1, 4).flatten(3).to(torch.float64)
