"""Whether a sequence gives the same tokens whatever else is in its batch; torch-free.

Products of rounded activations are sums of integers, which are exact in every order, and with one
scale a row what follows the sum has no order either: their launches may follow the batch, results
do not. Norms, gates and codes are computed a token at a time, in an order of their own
(`kernels.layer_math`). Attention splits a sequence by its own length and the runner's constant
table width. Draws depend on seed and position. So a decode step is invariant where every product
is one of integers, the head's included, and nothing has to be given up for it.

What is not: a product in floating point, whose sum is cut as the number of rows suggests; scales in
groups, whose partial sums are floating-point; experts, whose router is a product in floating point.
A prompt cut into other chunks is attended to in other tiles: each row still adds blocks of 64 keys
from the first on, but its last bits are promised for the same cuts alone.
"""

from engine.architecture import Architecture
from engine.errors import EngineError
from engine.spec import FULL_BITS, PER_CHANNEL, QuantSpec

__all__ = ["BatchesDiffer", "check_invariance"]

HEAD_BITS = 8
"""The head of one scale a row."""


class BatchesDiffer(EngineError):
    """The model cannot promise the same tokens in every batch."""

    code = "batches_differ"


def check_invariance(architecture: Architecture, spec: QuantSpec, head_bits: int | None) -> None:
    """Refuse a model whose results depend on the batch.

    Args:
        architecture: sizes and linears.
        spec: how they are quantized.
        head_bits: of the output head; None in full precision.

    Raises:
        BatchesDiffer: naming what depends on it and what would do.
    """
    if architecture.family.experts is not None:
        raise BatchesDiffer("experts: their router is not quantized; serve a dense model")
    if head_bits != HEAD_BITS:
        raise BatchesDiffer(
            f"head_bits = {head_bits}: use {HEAD_BITS}, which has integer products and one scale a"
            " row"
        )
    for linear in architecture.linears:
        grid, a_bits = spec.weight_grid(linear.name), spec.activation_bits(linear.name)
        if grid is None or a_bits == FULL_BITS:
            raise BatchesDiffer(
                f"{linear.name}: a product in floating point; use 1 to 8 bits for weights and 2 to"
                " 8 for activations"
            )
        if grid.group_size not in (PER_CHANNEL, linear.in_features):
            raise BatchesDiffer(
                f"{linear.name}: group_size = {grid.group_size} has floating-point sums; use one"
                " scale a channel"
            )
