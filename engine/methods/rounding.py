"""What is learned about the code of each weight.

    code = clamp(round(w / scale + V) + zero_point, 0, max_code)        V starts at 0

With |V| <= 1/2 each weight chooses between its two neighbours (AutoRound, Cheng et al. 2024);
without a bound the weight itself is trained, in steps of its grid (EfficientQAT's Block-AP, Chen et
al. 2025). Rounding is straight-through.
"""

from typing import assert_never

import torch
from torch import nn

from engine.modules.fake_quant import FakeQuantLinear
from engine.recipe import Rounding

__all__ = ["bound_offsets", "start_offsets"]

NEIGHBOURS = 0.5


def start_offsets(twins: list[FakeQuantLinear], rounding: Rounding) -> list[nn.Parameter]:
    """Give every twin an offset, where one is learned; return them."""
    match rounding:
        case Rounding.NEAREST:
            return []
        case Rounding.LEARNED | Rounding.TRAINED:
            for twin in twins:
                twin.offset = nn.Parameter(torch.zeros_like(twin.weight, dtype=torch.float32))
            return [twin.offset for twin in twins if twin.offset is not None]
        case _:
            assert_never(rounding)


@torch.no_grad()
def bound_offsets(offsets: list[nn.Parameter], rounding: Rounding) -> None:
    """Bring offsets back to where they may be, after a step."""
    if rounding is Rounding.LEARNED and offsets:
        for offset in offsets:
            offset.clamp_(-NEIGHBOURS, NEIGHBOURS)
