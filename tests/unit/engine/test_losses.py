"""What a wrong output is worth, against the formulas written out."""

import math

import pytest
import torch

from engine.methods.base import BlockOutputs
from engine.methods.compensation import RankOne, is_compensated
from engine.methods.losses import BlockLoss, map_divergence, token_weights


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SEEN, WANTED, OWN = draw(1, 2, 5, 8), draw(2, 2, 5, 8), draw(3, 2, 5, 8)


def outputs(**fields):
    return BlockOutputs(**{"seen": SEEN, "wanted": WANTED, **fields})


def mean_cosine(first, second):
    pairs = zip(first.flatten(0, 1), second.flatten(0, 1), strict=True)
    return sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / 10


def test_alone_the_error_is_the_mean_square():
    loss = BlockLoss()

    assert float(loss(outputs())) == pytest.approx(float((SEEN - WANTED).square().mean()))
    assert not loss.needs_own


def test_every_token_counts_by_its_weight():
    weight = torch.zeros(2, 5, 1)
    weight[1, 3] = 10

    found = BlockLoss()(outputs(token_weight=weight))

    assert float(found) == pytest.approx(float((SEEN - WANTED)[1, 3].square().mean()))


def test_the_distribution_correction_is_the_logarithm_of_both_mean_cosines():
    plain, corrected = BlockLoss(), BlockLoss(cosine=0.7)

    added = float(corrected(outputs(own=OWN)) - plain(outputs()))

    cosines = [-math.log(abs(mean_cosine(SEEN, each))) for each in (WANTED, OWN)]
    assert corrected.needs_own
    assert added == pytest.approx(0.7 * sum(cosines), rel=1e-4)


def test_both_teachers_are_compared_where_their_own_inputs_count():
    loss = BlockLoss(own=0.5, cosine=0.7)

    found = float(loss(outputs(own=OWN)))

    errors = [float((SEEN - each).square().mean()) for each in (WANTED, OWN)]
    cosines = [-math.log(abs(mean_cosine(SEEN, each))) for each in (WANTED, OWN)]
    assert loss.needs_own
    assert found == pytest.approx(errors[0] + 0.5 * errors[1] + 0.7 * sum(cosines), rel=1e-4)


def test_equal_outputs_cost_nothing():
    loss = BlockLoss(own=1, cosine=1)

    found = loss(BlockOutputs(seen=WANTED, wanted=WANTED, own=WANTED))

    assert float(found) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("fields", [{}, {"cosine": 1.0}, {"own": 1.0}])
def test_a_step_down_the_gradient_brings_the_loss_down(fields):
    seen = SEEN.clone().requires_grad_()
    loss = BlockLoss(**fields)
    before = loss(BlockOutputs(seen=seen, wanted=WANTED, own=OWN))

    before.backward()

    after = loss(BlockOutputs(seen=seen.detach() - 0.1 * seen.grad, wanted=WANTED, own=OWN))
    assert float(after) < before.item()


def test_a_token_weighs_no_more_than_the_median_token():
    wanted = draw(4, 3, 7, 16)
    wanted[0, 0] *= 1000

    weights = token_weights(wanted)

    power = wanted.square().mean(-1, keepdim=True)
    assert float((weights * power).max()) == pytest.approx(float(power.median()), rel=1e-5)
    assert (weights == 1).sum() == 11
    assert weights.shape == (3, 7, 1)


def make_maps(seed):
    scores = draw(seed, 2, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.float32).min
    return torch.log_softmax(scores.masked_fill(~mask, lowest), -1), mask


def test_the_divergence_of_maps_is_that_of_a_double_loop():
    (full, mask), (quant, _) = make_maps(5), make_maps(6)
    wanted = 0.0
    for head in range(2):
        for query in range(4):
            p = full[head, query, : query + 1].exp().double()
            q = quant[head, query, : query + 1].exp().double()
            wanted += float((p * (p / q).log()).sum() + (q * (q / p).log()).sum())

    found = float(map_divergence(full, quant, mask))

    assert found == pytest.approx(wanted / 8, rel=1e-5)
    assert found == pytest.approx(float(map_divergence(quant, full, mask)))


def test_equal_maps_do_not_diverge():
    full, mask = make_maps(5)

    assert float(map_divergence(full, full.clone(), mask)) == 0


def test_the_divergence_of_maps_leads_towards_them():
    (full, mask), (start, _) = make_maps(5), make_maps(6)
    scores = start.clamp(min=-50).requires_grad_()

    def divergence(scores):
        lowest = torch.finfo(torch.float32).min
        quant = torch.log_softmax(scores.masked_fill(~mask, lowest), -1)
        return map_divergence(full, quant, mask)

    before = divergence(scores)
    before.backward()

    assert bool(torch.isfinite(scores.grad).all())
    assert float(divergence(scores.detach() - 0.1 * scores.grad)) < before.item()


def test_a_compensation_starts_at_nothing_and_learns_both_vectors():
    change = RankOne(6, 8, torch.device("cpu"))
    weight, bias = draw(7, 6, 8), draw(8, 6)
    start, same = change(weight, bias)

    change.a.data += 0.5
    (change(weight, bias)[0] - 1).square().sum().backward()

    assert torch.equal(start, weight)
    assert same is bias
    assert bool(change.a.grad.abs().sum() > 0)
    assert bool(change.b.grad.abs().sum() > 0)


def test_the_first_three_and_the_last_four_layers_are_compensated():
    assert [index for index in range(12) if is_compensated(index, 12)] == [0, 1, 2, 8, 9, 10, 11]
