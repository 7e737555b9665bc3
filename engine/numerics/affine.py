"""Affine quantization of weights: a scale and a zero-point per row and group.

    low   = min(min w, 0)    high = max(max w, 0)          of the group
    asymmetric:  scale = (high - low) / max_code           zero_point = round(-low / scale)
    symmetric:   scale = max(|low|, |high|) / half         zero_point = half = max_code // 2
    code  = clamp(round(w / scale) + zero_point, 0, max_code)        w ~ (code - zero_point) * scale
    half step:   scale = max(|low|, |high|) / (max_code / 2)         zero_point = max_code // 2
    code  = clamp(round(w / scale + 1/2) + zero_point, 0, max_code)
    w ~ (code - zero_point - 1/2) * scale                            for two bits -1.5 .. 1.5 scales

The scale is rounded to float16 first and codes are computed with the rounded scale, so what is
stored is what was optimized. Rounding is half to even. Zero is inside the range, so the
zero-point is always a code.

Shape legend: N rows, K columns, G columns in a group, S = K / G groups.
"""

from dataclasses import dataclass

import torch

from engine.numerics.straight_through import FakeQuantize
from engine.spec import PER_CHANNEL, WeightGrid

__all__ = [
    "AffineParams",
    "GroupRange",
    "affine_params",
    "dequantize_weight",
    "doubled_codes",
    "fake_quantize",
    "quantize_weight",
    "round_through",
    "weight_range",
]

MIN_SCALE = 1e-5
MAX_SCALE = 65504.0
"""The largest float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRange:
    """What a grid has to cover in every group."""

    low: torch.Tensor
    """float32 ``[N, S]``, not above zero."""
    high: torch.Tensor
    """float32 ``[N, S]``, not below zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineParams:
    """Where the codes of a weight matrix lie: ``w ~ (code - zero_point) * scale``."""

    scale: torch.Tensor
    """float16 ``[N, S]``."""
    zero_point: torch.Tensor
    """uint8 ``[N, S]``, itself a code."""
    half_step: bool = False
    """Zero lies half a step above the zero-point (a grid without zero)."""

    @property
    def centre(self) -> torch.Tensor:
        """float32 ``[N, S]``: the place of zero among the codes."""
        return self.zero_point.float() + (0.5 if self.half_step else 0.0)

    def covered_range(self, grid: WeightGrid) -> GroupRange:
        """The range that places the grid here again, exactly.

        From one outermost code to the other; of a symmetric grid as far up as down, though an even
        count of codes has one more above.
        """
        scale_NS = self.scale.float()
        above_NS = self.centre if grid.symmetric else grid.max_code - self.centre
        return GroupRange(low=-self.centre * scale_NS, high=above_NS * scale_NS)


def weight_range(w_NK: torch.Tensor, group_size: int) -> GroupRange:
    """Measure the range of every group; it always includes zero.

    Args:
        w_NK: float ``[N, K]``, any strides.
        group_size: columns that share a scale and divide K, or `PER_CHANNEL`.

    Raises:
        ValueError: if the group size does not divide K.
    """
    w_NSG = _split_groups(w_NK.float(), group_size)
    # not aminmax: torch 2.11 has no derivative for it
    return GroupRange(low=w_NSG.amin(-1).clamp(max=0), high=w_NSG.amax(-1).clamp(min=0))


def affine_params(group_range: GroupRange, grid: WeightGrid) -> AffineParams:
    """Place the grid on a range."""
    scale_NS = _exact_scale(group_range, grid).to(torch.float16)
    zero_point_NS = _zero_point(group_range, scale_NS.float(), grid)
    return AffineParams(
        scale=scale_NS, zero_point=zero_point_NS.to(torch.uint8), half_step=grid.half_step
    )


def quantize_weight(w_NK: torch.Tensor, params: AffineParams, grid: WeightGrid) -> torch.Tensor:
    """Round to the nearest code: uint8 ``[N, K]``."""
    w_NSG = _split_groups(w_NK.float(), w_NK.shape[1] // params.scale.shape[1])
    q_NSG = w_NSG / params.scale.float().unsqueeze(-1)
    if params.half_step:
        q_NSG.add_(0.5)
    q_NSG = q_NSG.round_().add_(params.zero_point.unsqueeze(-1)).clamp_(0, grid.max_code)
    return q_NSG.to(torch.uint8).view(w_NK.shape)


def dequantize_weight(codes_NK: torch.Tensor, params: AffineParams) -> torch.Tensor:
    """Return the float32 ``[N, K]`` that codes stand for; the product is exact."""
    codes_NSG = _split_groups(codes_NK, codes_NK.shape[1] // params.scale.shape[1])
    centred_NSG = codes_NSG.float() - params.centre.unsqueeze(-1)
    return (centred_NSG * params.scale.float().unsqueeze(-1)).view(codes_NK.shape)


def doubled_codes(
    codes_NK: torch.Tensor, params: AffineParams
) -> tuple[torch.Tensor, AffineParams]:
    """Write a half-step grid as one with a whole zero-point: ``(2 u - (2 z + 1)) * (scale / 2)``.

    What multiplies integers needs no other form of a grid then.

    Returns:
        uint8 ``[N, K]`` codes up to ``2 * max_code``, and where they lie; the scale is float32.
    """
    # half of a subnormal float16 is not always one
    whole = AffineParams(scale=params.scale.float() / 2, zero_point=2 * params.zero_point + 1)
    return 2 * codes_NK, whole


def fake_quantize(
    w_NK: torch.Tensor,
    group_range: GroupRange,
    grid: WeightGrid,
    offset_NK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize, differentiable in the weight, the range and the offset.

    Rounding of codes and of the scale is straight-through, the clamp passes no gradient outside,
    and the zero-point is a constant (OmniQuant). Without an offset the value equals
    ``dequantize_weight(quantize_weight(...))``.

    Args:
        w_NK: float ``[N, K]``.
        group_range: what the grid covers, float32 ``[N, S]``.
        grid: of this layer.
        offset_NK: float ``[N, K]`` in steps of the grid, added before rounding (AutoRound's V).

    Returns:
        float32 ``[N, K]``.
    """
    scale_NS = _exact_scale(group_range, grid)
    scale_NS = scale_NS + (scale_NS.to(torch.float16).float() - scale_NS).detach()
    zero_point_NS1 = _zero_point(group_range, scale_NS, grid).detach().unsqueeze(-1)
    group = w_NK.shape[1] // scale_NS.shape[1]
    w_NSG = _split_groups(w_NK.float(), group)
    offset_NSG = None if offset_NK is None else _split_groups(offset_NK, group)
    out: torch.Tensor = FakeQuantize.apply(
        w_NSG, scale_NS.unsqueeze(-1), zero_point_NS1, offset_NSG, grid
    )  # type: ignore[no-untyped-call]  # torch has no types here
    return out.view(w_NK.shape)


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round to whole numbers, half to even; the gradient passes as if nothing had been rounded."""
    return x + (torch.round(x) - x).detach()


def _exact_scale(group_range: GroupRange, grid: WeightGrid) -> torch.Tensor:
    if grid.symmetric or grid.half_step:
        reach_NS = torch.maximum(group_range.high, -group_range.low)
        half = grid.max_code / 2 if grid.half_step else grid.max_code // 2
        scale_NS = _divide(reach_NS, half)
    else:
        scale_NS = _divide(group_range.high - group_range.low, grid.max_code)
    return scale_NS.clamp(MIN_SCALE, MAX_SCALE)


def _zero_point(group_range: GroupRange, scale_NS: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    if grid.symmetric or grid.half_step:
        return torch.full_like(scale_NS, grid.max_code // 2)
    # the rounded scale may be a little short, so -low / scale may pass the last code
    return torch.round(-group_range.low / scale_NS).clamp(0, grid.max_code)


def _divide(x: torch.Tensor, steps: float) -> torch.Tensor:
    # CUDA multiplies by the reciprocal of a plain number; a tensor makes it divide, as a CPU does
    return x / x.new_full((), steps)


def _split_groups(w_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    n, k = w_NK.shape
    group = k if group_size == PER_CHANNEL else group_size
    if k % group:
        raise ValueError(f"group_size {group} does not divide K = {k}")
    return w_NK.reshape(n, k // group, group)
