import pytest

from api.services.limits import KeyLimits, RateLimited
from api.settings import LimitSettings


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limits(clock):
    return KeyLimits(LimitSettings(key_requests=2, key_tokens_per_minute=600), clock)


def refusal(limits, key="k"):
    with pytest.raises(RateLimited) as refused:
        limits.enter(key)
    return refused.value


def test_a_key_has_so_many_requests_at_once_and_no_more(limits):
    first, _ = limits.enter("k"), limits.enter("k")

    assert "2 requests" in refusal(limits).message
    limits.enter("other")
    first.leave(1)
    limits.enter("k")


def test_a_slot_that_is_left_twice_counts_once(limits):
    first, _ = limits.enter("k"), limits.enter("k")
    first.leave(1)
    first.leave(1)
    limits.enter("k")

    assert "2 requests" in refusal(limits).message


def test_who_overdraws_waits_until_the_allowance_is_positive_again(limits, clock):
    limits.enter("k").leave(700)

    told_s = refusal(limits).extra["retry_after_s"]
    clock.now += told_s - 1
    refusal(limits)
    clock.now += 1
    limits.enter("k")

    # 100 tokens too many, and one to start with, at ten a second
    assert told_s == 11


def test_an_allowance_saves_up_a_minute_at_most(limits, clock):
    limits.enter("k").leave(500)
    clock.now += 3600

    limits.enter("k").leave(600)
    refusal(limits)
