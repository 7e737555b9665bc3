"""One option for each item at the least total loss within a total cost, or the other way round.

The multiple-choice knapsack, by dynamic programming over whole cost steps:

    best_0(0) = 0        best_i(c) = min over options j of  best_{i-1}(c - cost_ij) + loss_ij

A step is the greatest common divisor of all cost differences; sizes of linears share large
factors, so that is exact for models as they are. Where it would take more than `MAX_STEPS` steps
they become coarser and each item's cost is rounded up: a limit is still never passed, and what
the rounding leaves over is spent greedily.

Shape legend: C cost steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

__all__ = ["Frontier", "Option"]

MAX_STEPS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to treat an item."""

    cost: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """The least loss at every total cost."""

    items: Sequence[Sequence[Option]]
    base: int
    """Total cost of the cheapest options."""
    step: int
    loss_C: torch.Tensor  # noqa: N815  shape suffix
    """float64 ``[C]``: least loss at `base` and so many steps; infinite where none fits."""
    choices: Sequence[torch.Tensor]
    """int16 ``[C]`` of each item: its option on the way to a total."""

    @classmethod
    def of(cls, items: Sequence[Sequence[Option]], max_steps: int = MAX_STEPS) -> Self:
        """Solve for all totals at once; every item has at least one option."""
        base = sum(min(each.cost for each in options) for options in items)
        above = [
            [each.cost - min(o.cost for o in options) for each in options] for options in items
        ]
        step = _step_of(above, max_steps)
        steps = [[-(-cost // step) for cost in costs] for costs in above]
        size = 1 + sum(max(each) for each in steps)
        loss_C = torch.full((size,), math.inf, dtype=torch.float64)  # noqa: N806  shape suffix
        loss_C[0] = 0.0
        choices = []
        for options, taken in zip(items, steps, strict=True):
            loss_C, choice_C = _add_item(loss_C, options, taken)  # noqa: N806  shape suffix
            choices.append(choice_C)
        return cls(items=items, base=base, step=step, loss_C=loss_C, choices=choices)

    def within(self, cost: int) -> tuple[int, ...] | None:
        """Choose the options with the least loss that cost at most so much; None if none do."""
        if cost < self.base:
            return None
        last = min((cost - self.base) // self.step, len(self.loss_C) - 1)
        chosen = self._way_to(int(torch.argmin(self.loss_C[: last + 1])))
        return self._spend(chosen, cost - self.cost_of(chosen))

    def below(self, loss: float) -> tuple[int, ...] | None:
        """Choose the cheapest options whose loss is at most so much; None if none are."""
        enough = torch.nonzero(self.loss_C <= loss)
        return None if len(enough) == 0 else self._way_to(int(enough[0]))

    def cost_of(self, chosen: Sequence[int]) -> int:
        """Add up what the chosen options cost."""
        return sum(options[j].cost for options, j in zip(self.items, chosen, strict=True))

    def loss_of(self, chosen: Sequence[int]) -> float:
        """Add up what the chosen options lose."""
        return math.fsum(options[j].loss for options, j in zip(self.items, chosen, strict=True))

    def _way_to(self, total: int) -> tuple[int, ...]:
        chosen = []
        for options, choice_C in zip(reversed(self.items), reversed(self.choices), strict=True):  # noqa: N806  shape suffix
            taken = int(choice_C[total])
            chosen.append(taken)
            cheapest = min(each.cost for each in options)
            total -= -(-(options[taken].cost - cheapest) // self.step)
        return tuple(reversed(chosen))

    def _spend(self, chosen: tuple[int, ...], left: int) -> tuple[int, ...]:
        """Take single better options while they fit, the one that saves the most first."""
        current = list(chosen)
        while True:
            swaps = [
                (options[j].loss - options[now].loss, index, j, options[j].cost - options[now].cost)
                for index, (options, now) in enumerate(zip(self.items, current, strict=True))
                for j in range(len(options))
            ]
            fitting = [each for each in swaps if each[0] < 0 and each[3] <= left]
            if not fitting:
                return tuple(current)
            _, index, taken, cost = min(fitting)
            current[index] = taken
            left -= cost


def _step_of(above: Sequence[Sequence[int]], max_steps: int) -> int:
    exact = math.gcd(*(cost for costs in above for cost in costs)) or 1
    span = sum(max(costs) for costs in above)
    return max(exact, -(-span // max_steps))


def _add_item(
    loss_C: torch.Tensor,  # noqa: N803  shape suffix
    options: Sequence[Option],
    steps: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    best_C = torch.full_like(loss_C, math.inf)  # noqa: N806  shape suffix
    choice_C = torch.zeros(len(loss_C), dtype=torch.int16)  # noqa: N806  shape suffix
    for index, (option, taken) in enumerate(zip(options, steps, strict=True)):
        reached = loss_C[: len(loss_C) - taken] + option.loss
        is_better = reached < best_C[taken:]
        best_C[taken:][is_better] = reached[is_better]
        choice_C[taken:][is_better] = index
    return best_C, choice_C
