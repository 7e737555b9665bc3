"""Rounding with a gradient: what is kept for the backward pass are the inputs alone.

    t   = w / scale + offset + half            half = 1/2 on a half-step grid, else 0
    q   = clamp(round(t) + zero_point, 0, max_code)
    out = (q - zero_point - half) * scale

    d out / d w      = inside                  inside: the code before the clamp was in range
    d out / d offset = inside * scale
    d out / d scale  = (q - zero_point - half) - inside * w / scale        (LSQ, Esser et al. 2020)

Shape legend: N rows, G columns in a group, S groups in a row.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from typing_extensions import override

from engine.spec import WeightGrid

__all__ = ["FakeQuantize"]


class FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize groups on a placed grid, straight-through."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        w_NSG: torch.Tensor,
        scale_NS1: torch.Tensor,
        zero_point_NS1: torch.Tensor,
        offset_NSG: torch.Tensor | None,
        grid: WeightGrid,
    ) -> torch.Tensor:
        """Round float32 ``[N, S, G]`` with float32 scales and zero-points ``[N, S, 1]``."""
        ctx.save_for_backward(w_NSG, scale_NS1, zero_point_NS1, offset_NSG)
        ctx.grid = grid
        codes_NSG = _unclamped(w_NSG, scale_NS1, zero_point_NS1, offset_NSG, grid)
        codes_NSG.clamp_(0, grid.max_code)
        return codes_NSG.sub_(zero_point_NS1).sub_(_half(grid)).mul_(scale_NS1)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_NSG: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients of weight, scale and offset where they are wanted."""
        w_NSG, scale_NS1, zero_point_NS1, offset_NSG = ctx.saved_tensors
        grid: WeightGrid = ctx.grid
        codes_NSG = _unclamped(w_NSG, scale_NS1, zero_point_NS1, offset_NSG, grid)
        inside_NSG = (codes_NSG >= 0) & (codes_NSG <= grid.max_code)
        passed_NSG = grad_NSG * inside_NSG
        grad_scale_NS1 = None
        if ctx.needs_input_grad[1]:
            centred_NSG = codes_NSG.clamp_(0, grid.max_code).sub_(zero_point_NS1).sub_(_half(grid))
            through_NSG = (w_NSG / scale_NS1).mul_(passed_NSG)
            grad_scale_NS1 = centred_NSG.mul_(grad_NSG).sub_(through_NSG).sum(-1, keepdim=True)
        return (
            passed_NSG if ctx.needs_input_grad[0] else None,
            grad_scale_NS1,
            None,
            passed_NSG * scale_NS1 if ctx.needs_input_grad[3] else None,
            None,
        )


def _unclamped(
    w_NSG: torch.Tensor,
    scale_NS1: torch.Tensor,
    zero_point_NS1: torch.Tensor,
    offset_NSG: torch.Tensor | None,
    grid: WeightGrid,
) -> torch.Tensor:
    steps_NSG = w_NSG / scale_NS1
    if offset_NSG is not None:
        steps_NSG.add_(offset_NSG)
    if grid.half_step:
        steps_NSG.add_(_half(grid))
    return steps_NSG.round_().add_(zero_point_NS1)


def _half(grid: WeightGrid) -> float:
    return 0.5 if grid.half_step else 0.0
