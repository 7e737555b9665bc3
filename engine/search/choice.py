"""From measured losses and a target to the bits of every unit.

With L_w and L_a the losses of rounding weights and inputs, n the stored bits and m the number of
weights of a unit, the three targets are

    average bits, bytes:     min sum L_w          so that sum n <= limit
    perplexity increase r:   min sum n            so that sum L_w <= log(1 + r) - share of inputs

since log(perplexity ratio) = KL on text that the model itself would predict. Bits of inputs are
not stored. Where there is a choice of them, weights come first and then

    min sum m w_bits a_bits  so that sum L_a <= share of inputs

the bit operations of a token. The share is a fifth of the whole loss, more only where even the
widest choice loses more; with a target of perplexity it also gets what the weights left over.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.effort import SearchUnit
from engine.errors import SpecError
from engine.reach import Reach, grid_at, stored_bits
from engine.search.allocate import Frontier, Option
from engine.search.measurements import UnitMeasurements
from engine.search.sensitivity import losses_of
from engine.spec import QuantSpec
from engine.target import BitTarget

__all__ = ["Choice", "UnitTable", "choose_bits", "unit_tables"]

ACTIVATION_SHARE = 0.2
"""Of the whole loss; four fifths are left to the weights, whose bits cost memory."""
SLACK = 1 + 1e-12
"""Sums of the same losses in another order differ in the last bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTable:
    """One unit with its price list."""

    unit: SearchUnit
    stored: Mapping[int, int]
    """Stored bits at every width."""
    w_losses: Mapping[int, float]
    a_losses: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Bits of every unit, in their order."""

    w_bits: tuple[int, ...]
    a_bits: tuple[int, ...]


def unit_tables(
    spec: QuantSpec, units: Sequence[SearchUnit], measured: Mapping[str, UnitMeasurements]
) -> list[UnitTable]:
    """Relate what was measured to what it costs."""
    return [
        UnitTable(
            unit=unit,
            stored={
                bits: sum(
                    stored_bits(each, grid_at(spec, each.name, bits)) for each in unit.linears
                )
                for bits in unit.w_choices
            },
            w_losses=losses_of(measured[unit.name].weights, unit.w_choices, {}),
            a_losses=losses_of(
                measured[unit.name].activations, unit.a_choices, measured[unit.name].weights
            ),
        )
        for unit in units
    ]


def choose_bits(tables: Sequence[UnitTable], target: BitTarget, reach: Reach) -> Choice:
    """Solve for the bits of weights, then of inputs.

    Raises:
        SpecError: naming the range, if no choice is within the target.
    """
    least_a = math.fsum(min(each.a_losses.values()) for each in tables)
    frontier = Frontier.of(
        [
            [Option(cost=each.stored[bits], loss=each.w_losses[bits]) for bits in each.stored]
            for each in tables
        ]
    )
    if target.perplexity_increase is None:
        chosen = frontier.within(reach.limit_bits(target))
        # the sizes were checked before anything was measured
        assert chosen is not None, "a size below the smallest one is refused"
        lost = frontier.loss_of(chosen)
        share = max(least_a, ACTIVATION_SHARE / (1 - ACTIVATION_SHARE) * lost)
    else:
        limit = math.log1p(target.perplexity_increase)
        chosen = _within_loss(frontier, tables, target.perplexity_increase, least_a)
        # the weights may have left exactly that, and sums in another order differ in the last bit
        share = max(least_a, limit - frontier.loss_of(chosen))
    w_bits = tuple(list(each.stored)[j] for each, j in zip(tables, chosen, strict=True))
    return Choice(w_bits=w_bits, a_bits=_choose_inputs(tables, w_bits, share))


def _within_loss(
    frontier: Frontier, tables: Sequence[UnitTable], increase: float, least_a: float
) -> tuple[int, ...]:
    limit = math.log1p(increase)
    is_free = any(len(each.a_losses) > 1 for each in tables)
    reserved = max(least_a, ACTIVATION_SHARE * limit) if is_free else least_a
    chosen = frontier.below(limit - reserved)
    if chosen is None:
        # where the fifth was too much, the widest inputs leave the most to the weights
        chosen = frontier.below(limit - least_a)
    if chosen is None:
        least = math.expm1(least_a + math.fsum(min(each.w_losses.values()) for each in tables))
        raise SpecError(
            "target.perplexity_increase",
            increase,
            f"the widest of its choices is measured at {least:.3g}; allow more than that, or add"
            " wider w_choices or a_choices",
        )
    return chosen


def _choose_inputs(
    tables: Sequence[UnitTable], w_bits: Sequence[int], share: float
) -> tuple[int, ...]:
    frontier = Frontier.of(
        [
            [
                Option(cost=each.unit.weights * width * bits, loss=loss)
                for bits, loss in each.a_losses.items()
            ]
            for each, width in zip(tables, w_bits, strict=True)
        ]
    )
    chosen = frontier.below(share * SLACK)
    assert chosen is not None, "the share is at least what the widest choices lose"
    return tuple(list(each.a_losses)[j] for each, j in zip(tables, chosen, strict=True))
