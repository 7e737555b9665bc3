"""Linears taken out of a loaded model and joined along their outputs where they read alike.

Query, key and value become one product, and so do gate and up, where bits, groups and transforms of
their inputs agree; what differs stays apart, in the same order.

Shape legend: N outputs, K inputs, S groups of a row, P planes, W words of a row.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from engine.modules.linear import QuantLinear
from engine.numerics.affine import AffineParams
from kernels.layouts import unpack_codes

__all__ = ["FloatLinear", "StoredLinear", "join_linears"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLinear:
    """Rows of one or more quantized linears, as a checkpoint stores them."""

    packed: torch.Tensor
    """int32 ``[P, N, W]``."""
    scale: torch.Tensor
    """float16 ``[N, S]``."""
    zero_point: torch.Tensor
    """uint8 ``[N, S]``."""
    bias: torch.Tensor | None
    """float32 ``[N]``."""
    in_features: int
    half_step: bool
    a_bits: int
    hadamard: int = 0
    """Block of the transform of the inputs; 0 for none."""

    @property
    def groups(self) -> int:
        """S."""
        return self.scale.shape[1]

    @property
    def params(self) -> AffineParams:
        """Where the codes lie."""
        return AffineParams(scale=self.scale, zero_point=self.zero_point, half_step=self.half_step)

    def codes(self) -> torch.Tensor:
        """Unpack the codes: uint8 ``[N, K]``."""
        return unpack_codes(self.packed, self.in_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatLinear:
    """Rows of linears that stayed in full precision."""

    weight: torch.Tensor
    """float ``[N, K]``."""
    bias: torch.Tensor | None
    """float ``[N]``."""


def join_linears(
    linears: Iterable[nn.Module], rows: torch.Tensor | None = None
) -> list[StoredLinear | FloatLinear]:
    """Join neighbours that read their inputs alike.

    Args:
        linears: `QuantLinear` or `nn.Linear`, with inputs in common.
        rows: int64 ``[N]``, the order in which the rows of a single linear are wanted.
    """
    joined = [_join(list(alike)) for _, alike in groupby(linears, key=_kind)]
    if rows is None:
        return joined
    assert len(joined) == 1, "only a linear that is fused already has its rows in another order"
    return [_ordered(joined[0], rows)]


def _kind(linear: nn.Module) -> Hashable:
    """What has to agree."""
    if not isinstance(linear, QuantLinear):
        return "float"
    grid = linear.grid
    return (grid.planes, grid.half_step, grid.group_size, linear.a_bits, linear.input_hadamard)


def _join(linears: Sequence[nn.Module]) -> StoredLinear | FloatLinear:
    biases = [getattr(each, "bias", None) for each in linears]
    quantized = [each for each in linears if isinstance(each, QuantLinear)]
    if not quantized:
        weights = [each.get_parameter("weight") for each in linears]
        return FloatLinear(weight=_cat(weights), bias=_join_biases(biases, weights))
    first = quantized[0]
    scales = [each.weight_scale for each in quantized]
    bias = _join_biases(biases, scales)
    return StoredLinear(
        packed=_cat([each.weight_packed for each in quantized], dim=1),
        scale=_cat(scales),
        zero_point=_cat([each.weight_zero_point for each in quantized]),
        bias=None if bias is None else bias.float(),
        in_features=first.in_features,
        half_step=first.grid.half_step,
        a_bits=first.a_bits,
        hadamard=first.input_hadamard,
    )


def _join_biases(
    biases: Sequence[torch.Tensor | None], rows: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """Zeros where only others have a bias."""
    known = next((each for each in biases if each is not None), None)
    if known is None:
        return None
    pairs = zip(biases, rows, strict=True)
    return _cat([known.new_zeros(len(row)) if bias is None else bias for bias, row in pairs])


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Join without a copy of what stands alone."""
    return tensors[0].detach() if len(tensors) == 1 else torch.cat(list(tensors), dim).detach()


def _ordered(linear: StoredLinear | FloatLinear, rows: torch.Tensor) -> StoredLinear | FloatLinear:
    bias = None if linear.bias is None else linear.bias[rows]
    if isinstance(linear, FloatLinear):
        return FloatLinear(weight=linear.weight[rows], bias=bias)
    return StoredLinear(
        packed=linear.packed[:, rows].contiguous(),
        scale=linear.scale[rows],
        zero_point=linear.zero_point[rows],
        bias=bias,
        in_features=linear.in_features,
        half_step=linear.half_step,
        a_bits=linear.a_bits,
        hadamard=linear.hadamard,
    )
