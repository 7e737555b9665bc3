"""What a bit target can reach on a model, from sizes alone; torch-free.

    stored bits of a linear = N (planes 32 ceil(K / 32) + 24 S)

Shape legend: N outputs, K inputs, S groups in a row.
"""

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self

from engine.architecture import Architecture, LinearShape
from engine.errors import SpecError
from engine.spec import (
    FULL_BITS,
    SCALE_BITS,
    ZERO_POINT_BITS,
    LayerOverride,
    QuantSpec,
    WeightGrid,
)
from engine.target import BitTarget

__all__ = ["FP_BYTES", "Reach", "activation_choices", "grid_at", "stored_bits", "weight_choices"]

FP_BYTES = 2
"""A full-precision weight is stored in 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The smallest and the largest result that the choices of a target allow."""

    weights: int
    """In the linears that are quantized."""
    narrowest_bits: int
    """Stored bits of those linears, each at its cheapest width."""
    widest_bits: int
    """Stored bits of those linears, each at its dearest width."""
    rest_bytes: int
    """Everything else: embeddings, norms, biases, linears left in full precision."""

    @classmethod
    def of(cls, architecture: Architecture, spec: QuantSpec, rest_bytes: int | None = None) -> Self:
        """Measure what a spec with a target can reach.

        Args:
            architecture: the model's sizes.
            spec: its target's widths, and the overrides that pin layers.
            rest_bytes: where the files were counted; None takes 16 bits for each parameter.
        """
        weights = narrowest = widest = 0
        for linear in architecture.linears:
            sizes = [
                stored_bits(linear, grid_at(spec, linear.name, bits))
                for bits in weight_choices(spec, linear.name)
                if bits != FULL_BITS
            ]
            if sizes:
                weights += linear.weights
                narrowest += min(sizes)
                widest += max(sizes)
        if rest_bytes is None:
            rest_bytes = FP_BYTES * (architecture.parameter_count - weights)
        return cls(
            weights=weights,
            narrowest_bits=narrowest,
            widest_bits=widest,
            rest_bytes=rest_bytes,
        )

    def check(self, target: BitTarget) -> None:
        """Refuse a size below the smallest one that can be reached.

        Raises:
            SpecError: naming the range.
        """
        low, high = (bits / self.weights for bits in (self.narrowest_bits, self.widest_bits))
        if target.average_bits is not None and target.average_bits < low:
            raise SpecError(
                "target.average_bits",
                target.average_bits,
                f"its w_choices reach {_rounded_up(low)} to {_rounded_up(high)} stored bits per"
                " weight here; use one of these",
            )
        smallest, largest = (
            self.bytes_at(bits) for bits in (self.narrowest_bits, self.widest_bits)
        )
        if target.max_bytes is not None and target.max_bytes < smallest:
            raise SpecError(
                "target.max_bytes",
                target.max_bytes,
                f"its w_choices reach {smallest} to {largest} bytes here; use one of these",
            )

    def limit_bits(self, target: BitTarget) -> int:
        """Stored bits of the quantized linears that a target allows; never above the widest."""
        if target.average_bits is not None:
            return min(self.widest_bits, math.floor(target.average_bits * self.weights))
        if target.max_bytes is not None:
            return min(self.widest_bits, 8 * (target.max_bytes - self.rest_bytes))
        return self.widest_bits

    def bytes_at(self, bits: int) -> int:
        """All stored bytes, where the quantized linears take so many bits."""
        return self.rest_bytes + math.ceil(bits / 8)


def stored_bits(linear: LinearShape, grid: WeightGrid | None) -> int:
    """Count what one linear takes: planes in whole 32-bit words, scales and zero-points."""
    if grid is None:
        return linear.weights * FULL_BITS
    columns = math.ceil(linear.in_features / 32) * 32
    groups = linear.in_features // grid.group_of(linear.in_features)
    per_row = columns * grid.planes + groups * (SCALE_BITS + ZERO_POINT_BITS)
    return linear.out_features * per_row


def grid_at(spec: QuantSpec, name: str, bits: int) -> WeightGrid | None:
    """The grid that a linear would have at another width."""
    other = LayerOverride(pattern=name, w_bits=bits)
    return replace(spec, overrides=(*spec.overrides, other)).weight_grid(name)


def weight_choices(spec: QuantSpec, name: str) -> tuple[int, ...]:
    """Widths that a search may give a linear: the one that an override pins, else the target's."""
    pinned = [each.w_bits for each in _matching(spec, name) if each.w_bits is not None]
    if pinned or spec.target is None:
        return (pinned[-1] if pinned else spec.w_bits,)
    return tuple(sorted(set(spec.target.w_choices)))


def activation_choices(spec: QuantSpec, name: str) -> tuple[int, ...]:
    """Widths that a search may give the inputs of a linear."""
    pinned = [each.a_bits for each in _matching(spec, name) if each.a_bits is not None]
    if pinned or spec.target is None or not spec.target.a_choices:
        return (pinned[-1] if pinned else spec.a_bits,)
    return tuple(sorted(set(spec.target.a_choices)))


def _matching(spec: QuantSpec, name: str) -> list[LayerOverride]:
    return [each for each in spec.overrides if fnmatchcase(name, each.pattern)]


def _rounded_up(bits: float) -> float:
    # what the refusal offers must itself be accepted
    return math.ceil(bits * 1000) / 1000
