"""An output head rounded at load: 8 bits a channel, or 4 bits in groups with searched clips.

Shape legend: V vocabulary, H hidden size, S groups of a row.
"""

from collections.abc import Callable

import torch

from engine.inference.decoder.stored import StoredLinear
from engine.methods.clipping import SearchedClipping
from engine.modules.fake_quant import keep_range
from engine.numerics.affine import affine_params, quantize_weight, weight_range
from engine.spec import PER_CHANNEL, WeightGrid
from kernels.layouts import pack_codes

__all__ = ["HEAD_BITS", "quantize_head"]

HEAD_BITS = (8, 4)
"""What is offered."""
INPUT_BITS = 8
GROUPS = (128, 64, 32)
"""Preferred first; the kernels take no others."""
CHUNK_ROWS = 8192
"""Rounded at a time: a search keeps several float32 copies."""


@torch.no_grad()
def quantize_head(
    weight: torch.Tensor,
    bits: int,
    input_power: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> StoredLinear:
    """Round a head to the nearest codes, inputs to 8 bits.

    Args:
        weight: float ``[V, H]``.
        bits: 8 or 4.
        input_power: float32 ``[H]``, mean square of each input.
        change: of rows, before they are rounded; None for nothing.

    Raises:
        ValueError: if the bits are not offered.
    """
    if bits not in HEAD_BITS:
        raise ValueError(f"head_bits = {bits}: use one of {HEAD_BITS}, or None for full precision")
    grid = WeightGrid(
        bits=bits,
        group_size=_group_size(weight.shape[1]) if bits < INPUT_BITS else PER_CHANNEL,
        symmetric=False,
        bit_balance=False,
    )
    packed, scales, zero_points = [], [], []
    for rows in torch.split(weight, CHUNK_ROWS):
        w = rows.float() if change is None else change(rows)
        searches = bits < INPUT_BITS
        clip = SearchedClipping().clip_for(w, grid, input_power) if searches else keep_range
        params = affine_params(clip(weight_range(w, grid.group_size)), grid)
        packed.append(pack_codes(quantize_weight(w, params, grid), grid.planes))
        scales.append(params.scale)
        zero_points.append(params.zero_point)
    return StoredLinear(
        packed=torch.cat(packed, dim=1),
        scale=torch.cat(scales),
        zero_point=torch.cat(zero_points),
        bias=None,
        in_features=weight.shape[1],
        half_step=False,
        a_bits=INPUT_BITS,
    )


def _group_size(hidden: int) -> int:
    return next((size for size in GROUPS if not hidden % size), PER_CHANNEL)
