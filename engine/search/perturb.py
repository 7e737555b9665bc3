"""Rounding one part of a full-precision block for a moment: the candidates of a bit search.

Weights get the clip that rounds with the least error weighted by their inputs
(`engine.methods.clipping`), inputs the dynamic grid of each token that run time uses.

Shape legend: N rows, K columns of a weight.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from engine.methods.clipping import best_ratio
from engine.numerics.affine import (
    GroupRange,
    affine_params,
    dequantize_weight,
    quantize_weight,
    weight_range,
)
from engine.spec import WeightGrid
from kernels.activation_rounding import round_activations

__all__ = ["round_weight", "rounded_inputs", "rounded_weights"]


@torch.no_grad()
def round_weight(weight: torch.Tensor, grid: WeightGrid, input_power: torch.Tensor) -> torch.Tensor:
    """Round a weight onto its clipped grid and back.

    Args:
        weight: float ``[N, K]``.
        grid: where it is rounded to.
        input_power: float32 ``[K]``, mean square of each input.

    Returns:
        A fresh ``[N, K]`` in the dtype of `weight`.
    """
    full = weight_range(weight, grid.group_size)
    ratio_NS = best_ratio(weight, grid, input_power)  # noqa: N806  shape suffix
    clipped = GroupRange(low=full.low * ratio_NS, high=full.high * ratio_NS)
    params = affine_params(clipped, grid)
    return dequantize_weight(quantize_weight(weight, params, grid), params).to(weight.dtype)


@contextmanager
def rounded_weights(
    linears: Sequence[nn.Linear], weights: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Let linears compute with other weights ``[N, K]``; theirs come back afterwards."""
    kept = [linear.weight.data for linear in linears]
    try:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.data = weight
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight


@contextmanager
def rounded_inputs(linears: Sequence[nn.Linear], bits: int) -> Iterator[None]:
    """Let linears see their inputs rounded to some bits, one scale a token."""

    def round_input(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[torch.Tensor]:
        x: torch.Tensor = arguments[0]
        return (round_activations(x, bits).to(x.dtype),)

    with ExitStack() as hooks:
        for linear in linears:
            hooks.callback(linear.register_forward_pre_hook(round_input).remove)
        yield
