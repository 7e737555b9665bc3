"""What a search makes of measured losses and a target."""

import math
import random

from engine.architecture import LinearShape
from engine.effort import SearchUnit
from engine.reach import Reach
from engine.search.choice import UnitTable, choose_bits
from engine.target import BitTarget

WIDTHS = (2, 4, 8)
ANY_SIZE = Reach(weights=1, narrowest_bits=1, widest_bits=10**9, rest_bytes=0)


def table(name, loss):
    linear = LinearShape(name=name, out_features=32, in_features=32)
    return UnitTable(
        unit=SearchUnit(name=name, linears=(linear,), w_choices=WIDTHS, a_choices=(16,)),
        stored={bits: 1024 * bits for bits in WIDTHS},
        w_losses={2: loss, 4: loss / 9, 8: loss / 200},
        a_losses={16: 0.0},
    )


def test_a_target_that_is_exactly_a_choice_is_reached():
    draw = random.Random(1)  # noqa: S311  reproducible, not secret
    for _ in range(300):
        tables = [table(f"u{each}", draw.random() * 0.1) for each in range(draw.randint(2, 8))]
        # summed in another order than the search does
        limit = 0.0
        for each in tables:
            limit += each.w_losses[draw.choice(WIDTHS)]
        target = BitTarget(perplexity_increase=max(1e-4, math.expm1(limit)))

        choice = choose_bits(tables, target, ANY_SIZE)

        assert choice.a_bits == (16,) * len(tables)
