"""The solver, held against trying everything."""

import itertools
import random

import pytest

from engine.search.allocate import Frontier, Option


def instance(seed, *, items=5, options=4, scale=1):
    """Options whose loss mostly falls with their cost, as measured ones do, but not always."""
    chance = random.Random(seed)  # noqa: S311 - a test instance, no secret
    return [
        [
            Option(cost=scale * chance.randint(1, 40), loss=chance.random() * 2 ** -j)
            for j in range(chance.randint(1, options))
        ]
        for _ in range(items)
    ]  # fmt: skip


def every_choice(items):
    for chosen in itertools.product(*(range(len(options)) for options in items)):
        picked = [options[j] for options, j in zip(items, chosen, strict=True)]
        yield sum(each.cost for each in picked), sum(each.loss for each in picked)


def limits_of(items):
    costs = sorted({cost for cost, _ in every_choice(items)})
    return [costs[0], costs[len(costs) // 3], costs[len(costs) // 2] + 1, costs[-1] + 100]


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_a_cost_loses_less(seed):
    items = instance(seed, scale=1 + seed % 3 * 17)
    frontier = Frontier.of(items)

    for limit in limits_of(items):
        chosen = frontier.within(limit)

        best = min(loss for cost, loss in every_choice(items) if cost <= limit)
        assert frontier.cost_of(chosen) <= limit
        assert frontier.loss_of(chosen) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_below_a_loss_is_cheaper(seed):
    items = instance(seed)
    frontier = Frontier.of(items)

    for limit in (0.3, 0.8, 1.5, 4.0):
        cheap = [cost for cost, loss in every_choice(items) if loss <= limit]
        chosen = frontier.below(limit)

        if not cheap:
            assert chosen is None
        else:
            assert frontier.cost_of(chosen) == min(cheap)
            assert frontier.loss_of(chosen) <= limit * (1 + 1e-12)


def test_a_cost_below_the_cheapest_options_has_no_choice():
    items = instance(0)
    cheapest = sum(min(each.cost for each in options) for options in items)

    assert Frontier.of(items).within(cheapest - 1) is None
    assert Frontier.of(items).within(cheapest) is not None


@pytest.mark.parametrize("seed", range(8))
def test_coarse_steps_never_pass_a_limit_and_spend_nearly_all_of_it(seed):
    items = instance(seed, items=6, scale=997)
    exact, coarse = Frontier.of(items), Frontier.of(items, max_steps=40)

    for limit in limits_of(items):
        chosen = coarse.within(limit)

        assert coarse.cost_of(chosen) <= limit
        # no single change that still fits would lose less
        left = limit - coarse.cost_of(chosen)
        gains = [
            each
            for options, now in zip(items, chosen, strict=True)
            for each in options
            if each.loss < options[now].loss and each.cost - options[now].cost <= left
        ]
        assert gains == []
        assert coarse.loss_of(chosen) <= exact.loss_of(exact.within(limit)) * 1.5 + 1e-12


def test_hundreds_of_layers_are_solved_exactly_in_whole_steps():
    sizes = [3 * 110_592 * (1 + index % 8) for index in range(560)]
    items = [
        [
            Option(cost=size * bits, loss=(1 + index % 13) * 4.0**-bits)
            for bits in (2, 3, 4, 5, 6, 8)
        ]
        for index, size in enumerate(sizes)
    ]
    frontier = Frontier.of(items)

    chosen = frontier.within(int(3.5 * sum(sizes)))

    # one layer's smallest step may stay unused, no more
    assert 0 <= int(3.5 * sum(sizes)) - frontier.cost_of(chosen) < 3 * 110_592
    bits = [(2, 3, 4, 5, 6, 8)[j] for j in chosen]
    assert min(bits) < 3.5 < max(bits)
