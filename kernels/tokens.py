"""Quantized tokens in the form that products on a GPU read.

    x ~ (codes - zero_point) * scale
    sums[m,g] = sum_{k in g} codes[m,k]

Codes are signed bytes: those of 8 bits lie 128 below the unsigned ones, and so do their
zero-points, which leaves every difference as it was; narrower codes are the unsigned ones. Columns
beyond K hold zero and add nothing to a product or a sum.

Shape legend: M tokens, K features, G features in a group, S = K / G groups, L >= K columns.
"""

from dataclasses import dataclass
from typing import Self

import torch

from kernels.activation_quant import QuantizedActivations

__all__ = ["BYTE_SHIFT", "TokenCodes"]

BYTE_SHIFT = 128
BYTE_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCodes:
    """M quantized tokens."""

    codes: torch.Tensor
    """int8 ``[M, L]``, rows 16-byte aligned where L is a multiple of 16."""
    scale: torch.Tensor
    """float32 ``[M]``."""
    zero_point: torch.Tensor
    """int32 ``[M]``, shifted as the codes are."""
    sums: torch.Tensor
    """int32 ``[M, S]``."""
    bits: int
    """2..8."""

    @classmethod
    def from_activations(
        cls, activations: QuantizedActivations, *, groups: int = 1, columns: int | None = None
    ) -> Self:
        """Shift, pad and sum in plain torch: the reference of every kernel that writes tokens.

        Args:
            activations: M tokens of K codes.
            groups: S, dividing K.
            columns: L; None takes K.

        Raises:
            ValueError: if the groups do not divide K, or L is less.
        """
        m, k = activations.codes.shape
        columns = k if columns is None else columns
        if k % groups or columns < k:
            raise ValueError(f"{groups} groups and {columns} columns do not fit K = {k}")
        shift = BYTE_SHIFT if activations.bits == BYTE_BITS else 0
        codes = activations.codes.new_zeros((m, columns), dtype=torch.int8)
        codes[:, :k] = (activations.codes.to(torch.int16) - shift).to(torch.int8)
        sums = codes[:, :k].view(m, groups, k // groups).sum(-1, dtype=torch.int32)
        return cls(
            codes=codes,
            scale=activations.scale.view(m).clone(),
            zero_point=(activations.zero_point - shift).view(m).to(torch.int32),
            sums=sums,
            bits=activations.bits,
        )
