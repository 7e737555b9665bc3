"""How weights are rounded, and how many bits that stores; torch-free.

A weight grid of n bits has the codes 0 .. 2^n - 1. With bit balance (n <= 2) it has one code
more, 0 .. 2^n (ABQ-LLM section 3.3), and is stored in the planes that those codes need: `w2*`
takes three. A row of K weights is stored in planes of whole 32-bit words, so a weight costs
`planes * 32 ceil(K / 32) / K + (SCALE_BITS + ZERO_POINT_BITS) / group` bits.
"""

import math
from dataclasses import dataclass

__all__ = ["PER_CHANNEL", "SCALE_BITS", "ZERO_POINT_BITS", "WeightGrid"]

PER_CHANNEL = -1
SCALE_BITS = 16
ZERO_POINT_BITS = 8
WORD_BITS = 32
"""Of a plane; a row's last word is padded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrid:
    """How the weights of one linear layer are rounded."""

    bits: int
    group_size: int
    symmetric: bool
    bit_balance: bool
    half_step: bool = False
    """The levels lie half a step beside zero, symmetric: for two bits -1.5, -0.5, 0.5, 1.5."""

    @property
    def max_code(self) -> int:
        """The largest code; codes start at 0."""
        return (1 << self.bits) - (0 if self.bit_balance else 1)

    @property
    def planes(self) -> int:
        """Bit-planes that store a code."""
        return self.max_code.bit_length()

    def group_of(self, in_features: int) -> int:
        """Inputs that share one scale."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def promised_bits(self, in_features: int) -> float:
        """Stored bits per weight: planes in whole words, scales and zero-points."""
        columns = math.ceil(in_features / WORD_BITS) * WORD_BITS
        scales = (SCALE_BITS + ZERO_POINT_BITS) / self.group_of(in_features)
        return self.planes * columns / in_features + scales
