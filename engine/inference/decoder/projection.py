"""Products of a layer: matrices as a device multiplies them, joined where they stay apart.

Shape legend: M tokens, N outputs, K inputs.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import torch

from engine.inference.decoder.operands import VALUES, Operand, Reading, Source
from engine.modules.operand import Operand as DerivedOperand
from engine.modules.operand import multiply
from engine.modules.rotated import OnlineHadamard
from engine.spec import FULL_BITS
from kernels.linear import integer_linear, weight_only_linear
from kernels.sliced import SlicedWeight
from kernels.tokens import TokenCodes

__all__ = ["DerivedMatrix", "FloatMatrix", "Matrix", "Projection", "SlicedMatrix"]


class Matrix(Protocol):
    """N outputs of one product."""

    @property
    def reading(self) -> Reading:
        """The form in which inputs are read."""

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""

    def multiply(self, operand: Operand) -> torch.Tensor:
        """Give ``[M, N]``, in the dtype of the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One or more matrices with inputs in common, their outputs side by side."""

    parts: tuple[Matrix, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(each.nbytes for each in self.parts)

    def apply(self, source: Source) -> torch.Tensor:
        """Give ``[M, N]`` for M tokens."""
        outs = [part.multiply(source.read(part.reading)) for part in self.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedMatrix:
    """Slices of codes, multiplied by the kernels of a GPU."""

    weight: SlicedWeight
    bias: torch.Tensor | None
    """float32 ``[N]``."""
    reading: Reading
    out_dtype: torch.dtype
    counters: torch.Tensor
    """Shared by all products of a stream (`kernels.linear.make_counters`)."""

    @property
    def nbytes(self) -> int:
        """Bytes of slices, scales and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def multiply(self, operand: Operand) -> torch.Tensor:
        """Give ``[M, N]``."""
        if isinstance(operand, TokenCodes):
            return integer_linear(
                operand, self.weight, self.bias, out_dtype=self.out_dtype, counters=self.counters
            )
        return weight_only_linear(operand, self.weight, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedMatrix:
    """What `QuantLinear` multiplies with: all of a CPU, and groups that no fast kernel takes."""

    operand: DerivedOperand
    bias: torch.Tensor | None
    a_bits: int
    transform: OnlineHadamard | None = None

    @property
    def reading(self) -> Reading:
        """Values: the product rounds them itself."""
        return VALUES

    @property
    def nbytes(self) -> int:
        """Bytes of operand and bias."""
        return _bytes_of(self.operand) + (0 if self.bias is None else self.bias.nbytes)

    def multiply(self, operand: Operand) -> torch.Tensor:
        """Give ``[M, N]``."""
        assert isinstance(operand, torch.Tensor), "it reads values"
        seen = operand
        if self.transform is not None:
            seen = self.transform(operand if self.a_bits == FULL_BITS else operand.float())
        return multiply(seen, self.operand, self.a_bits, self.bias).to(operand.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatMatrix:
    """A weight in full precision."""

    weight: torch.Tensor
    """float ``[N, K]``."""
    bias: torch.Tensor | None
    """float ``[N]``, of the same dtype."""

    @property
    def reading(self) -> Reading:
        """Values."""
        return VALUES

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def multiply(self, operand: Operand) -> torch.Tensor:
        """Give ``[M, N]``."""
        assert isinstance(operand, torch.Tensor), "it reads values"
        return torch.nn.functional.linear(operand, self.weight, self.bias)


def _bytes_of(operand: DerivedOperand) -> int:
    """Bytes of every tensor of an operand."""
    if isinstance(operand, torch.Tensor):
        return operand.nbytes
    values = [getattr(operand, each.name) for each in fields(operand)]
    tensors = [
        each for value in values for each in (value if isinstance(value, tuple) else [value])
    ]
    return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
