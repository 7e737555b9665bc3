"""A finished block, rebuilt from the store."""

from collections.abc import Mapping

import torch
from torch import nn

from engine.calibration.resume import SavedBlock
from engine.modules.attention import round_queries
from engine.modules.linear import QuantLinear
from engine.modules.swap import named_linears, swap_modules
from engine.spec import QuantSpec

__all__ = ["QUANT_PARTS", "REMAINDER", "restore_block"]

QUANT_PARTS = ("weight_packed", "weight_scale", "weight_zero_point")
REMAINDER = "weight_remainder"
"""Kept in the store alone, for the last stage."""


def restore_block(
    block: nn.Module,
    name: str,
    saved: SavedBlock,
    spec: QuantSpec,
    hadamards: Mapping[str, int],
) -> None:
    """Put packed layers, and norms and biases that changed, into a full-precision block.

    Its queries are rounded from then on, where the spec says so.

    Args:
        block: changed in place.
        name: its full name.
        saved: what was learned.
        spec: says the grid of every layer.
        hadamards: blocks of online transforms, by the linear's name inside the block.
    """
    device = next(block.parameters()).device
    layers = {}
    for short, linear in named_linears(block).items():
        grid = spec.weight_grid(f"{name}.{short}")
        if grid is None:
            continue
        a_bits = spec.activation_bits(f"{name}.{short}")
        layer = QuantLinear.empty(linear, grid, a_bits, hadamards.get(short, 0))
        for part in QUANT_PARTS:
            setattr(layer, part, saved.tensors[f"{short}.{part}"].to(device))
        layer.bias = linear.bias
        remainder = saved.tensors.get(f"{short}.{REMAINDER}")
        layer.remainder = None if remainder is None else remainder.to(device)
        layers[short] = layer.prepare()
    swap_modules(block, layers)
    block.load_state_dict(_others(saved.tensors, device), strict=False, assign=True)
    round_queries(block, spec.q_bits)


def _others(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(device).float()
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] not in (*QUANT_PARTS, REMAINDER)
    }
