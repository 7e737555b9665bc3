from collections import Counter

import pytest
import torch

from engine.errors import EngineError
from engine.inference.request import GenerationRequest
from engine.inference.sampler import Sampler

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def sampler_of(**fields):
    return Sampler(GenerationRequest(prompt_ids=(1,), **fields))


def frequencies(draws=4000, **fields):
    sampler = sampler_of(seed=1, **fields)
    counts = Counter(sampler.choose(LOGITS) for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


def test_temperature_zero_always_takes_the_likeliest():
    assert frequencies(20, temperature=0) == {0: 1.0}


def test_draws_follow_the_probabilities():
    assert frequencies() == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=0.03)


def test_a_low_temperature_sharpens():
    # squared and renormalized
    total = 0.25 + 0.09 + 0.0225 + 0.0025
    expected = {0: 0.25 / total, 1: 0.09 / total, 2: 0.0225 / total, 3: 0.0025 / total}

    assert frequencies(temperature=0.5) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_the_k_likeliest():
    assert frequencies(top_k=2) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert set(frequencies(top_k=100)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    assert set(frequencies(top_p=top_p)) == kept


def test_top_p_is_taken_of_what_top_k_left():
    # of 0.625 and 0.375 the first alone reaches 0.6
    assert set(frequencies(top_k=2, top_p=0.6)) == {0}


def test_equal_seeds_give_equal_draws_and_others_do_not():
    def draws(seed):
        sampler = sampler_of(seed=seed)
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_a_request_without_a_seed_draws_its_own():
    first, second = sampler_of(), sampler_of()

    assert [first.choose(LOGITS) for _ in range(80)] != [second.choose(LOGITS) for _ in range(80)]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_every_64_bit_seed_is_a_seed(seed):
    assert sampler_of(seed=seed).choose(LOGITS) in range(4)


def test_another_requests_draws_do_not_matter():
    alone, beside, other = sampler_of(seed=5), sampler_of(seed=5), sampler_of(seed=6)
    expected = [alone.choose(LOGITS) for _ in range(20)]

    seen = []
    for _ in range(20):
        other.choose(LOGITS)
        seen.append(beside.choose(LOGITS))

    assert seen == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error_and_no_token(value, temperature):
    logits = LOGITS.clone()
    logits[2] = value

    with pytest.raises(EngineError, match="not finite"):
        sampler_of(temperature=temperature).choose(logits)
