import random

import pytest

from engine.errors import EngineOverloaded
from engine.inference.limits import RunnerShape, SchedulerLimits
from engine.inference.planning import share_tokens
from engine.inference.sampling_params import Guide, GuideKind, SamplingParams
from engine.inference.scheduler import Scheduler
from engine.inference.sequence import SequenceState, TokenSequence
from tests.unit.engine.hashing_runner import HashingRunner, next_token

GREEDY = SamplingParams(temperature=0, seed=0)


class Machine:
    """A scheduler and a runner, stepped by hand as the engine's thread steps them."""

    def __init__(self, *, overlaps=True, limits=None, **shape):
        self.runner = HashingRunner(**shape)
        limits = limits or SchedulerLimits()
        self.scheduler = Scheduler(RunnerShape.of(self.runner), limits)
        self._max_step_tokens = limits.max_step_tokens
        self.flights = []
        self._overlaps = overlaps

    def launch(self):
        planned = self.scheduler.plan()
        self.close_slots()
        if planned is not None:
            assert sum(step.count for step in planned.plan.steps) <= self._max_step_tokens
            for sequence in planned.started:
                self.runner.open(sequence.slot, sequence.sampling, sequence.prompt_ids)
            self.flights.append((planned, self.runner.launch(planned.plan)))
        return planned

    def receive(self):
        planned, pending = self.flights.pop(0)
        won = self.scheduler.receive(planned, pending.wait())
        for sequence, drawn in won:
            if self.is_complete(sequence, drawn):
                self.scheduler.finish(sequence)
        self.close_slots()
        return won

    def is_complete(self, sequence, drawn):
        return sequence.drawn == sequence.max_tokens

    def turn(self):
        planned = self.launch()
        if planned is None and not self.flights:
            assert not self.scheduler.waiting, "nothing can be planned and sequences wait"
            assert not self.scheduler.running, "nothing can be planned and sequences run"
        if self.flights and (planned is None or len(self.flights) > self._overlaps):
            self.receive()
        return planned

    def run(self, *sequences):
        self.scheduler.add(sequences)
        while any(each.state is not SequenceState.FINISHED for each in sequences):
            self.turn()
        while self.flights:
            self.receive()

    def close_slots(self):
        for slot in self.scheduler.take_closed():
            self.runner.close(slot)

    def assert_empty(self):
        assert self.scheduler.usage == 0
        assert not self.runner.open_slots
        assert not self.scheduler.running
        assert not self.scheduler.waiting


def sequence_of(prompt=(1, 2, 3), max_tokens=8, sampling=GREEDY, **fields):
    return TokenSequence(tuple(prompt), sampling, max_tokens, **fields)


def answer_alone(sequence):
    tokens = list(sequence.prompt_ids)
    while len(tokens) < len(sequence.prompt_ids) + sequence.max_tokens:
        tokens.append(next_token(tuple(tokens), sequence.sampling))
    return tokens


def plan_counts(machine):
    return [tuple(step.count for step in plan.steps) for plan in machine.runner.plans]


def test_a_decode_step_is_planned_before_the_result_of_the_last_is_known():
    machine = Machine()
    sequence = sequence_of(max_tokens=3)
    machine.scheduler.add([sequence])

    machine.launch()
    second = machine.launch()

    assert sequence.drawn == 0
    assert second.plan.steps[0].token_ids == ()
    assert second.plan.steps[0].start == 3
    assert second.plan.is_decode


def test_a_sequence_takes_exactly_the_steps_that_its_tokens_need():
    machine = Machine()

    machine.run(sequence_of(max_tokens=5))

    assert plan_counts(machine) == [(3,)] + [(1,)] * 4
    assert machine.scheduler.counts.discarded_tokens == 0


def test_a_stop_found_late_discards_one_token():
    machine = Machine()
    sequence = sequence_of(max_tokens=50)
    machine.scheduler.add([sequence])
    machine.turn()
    machine.turn()

    machine.scheduler.finish(sequence)
    while machine.flights:
        machine.receive()

    assert machine.scheduler.counts.discarded_tokens == 1
    machine.assert_empty()


def test_a_slot_is_given_out_again_only_after_the_last_step_that_names_it():
    machine = Machine(max_sequences=1)
    first, second = sequence_of(max_tokens=50), sequence_of(max_tokens=1)
    machine.scheduler.add([first])
    machine.turn()
    machine.turn()
    machine.scheduler.finish(first)
    machine.scheduler.add([second])

    while_running = machine.launch()
    machine.receive()
    afterwards = machine.launch()

    assert while_running is None
    assert afterwards.started == (second,)


@pytest.mark.parametrize("overlaps", [True, False])
def test_decoding_sequences_come_first_and_a_prompt_enters_in_chunks_beside_them(overlaps):
    machine = Machine(
        overlaps=overlaps, limits=SchedulerLimits(max_step_tokens=9), context_length=999
    )
    early, late = sequence_of(max_tokens=8), sequence_of(range(20), max_tokens=1)
    machine.scheduler.add([early])
    machine.turn()
    machine.run(late)

    assert plan_counts(machine)[:4] == [(3,), (1, 8), (1, 8), (1, 4)]
    assert late.tokens == answer_alone(late)


def test_only_the_last_chunk_of_a_prompt_draws():
    machine = Machine(limits=SchedulerLimits(max_step_tokens=8))

    machine.run(sequence_of(range(18), max_tokens=1))

    assert [plan.steps[0].draws for plan in machine.runner.plans] == [False, False, True]


def test_equal_beginnings_share_whole_pages():
    machine = Machine()
    first, second = sequence_of(range(11)), sequence_of((*range(9), 50, 51))
    machine.run(first)

    machine.run(second)

    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert second.tokens == answer_alone(second)
    counts = machine.scheduler.counts
    assert (counts.prefix_queries, counts.prefix_hits) == (22, 8)


def test_the_last_token_of_a_cached_prompt_is_computed_again():
    machine = Machine()
    machine.run(sequence_of(range(8)))
    again = sequence_of(range(8))

    machine.run(again)

    assert again.cached_tokens == 4
    assert again.tokens == answer_alone(again)


def test_an_answer_is_found_again_as_part_of_the_next_prompt():
    machine = Machine()
    turn = sequence_of(range(4), max_tokens=9)
    machine.run(turn)
    following = sequence_of((*turn.tokens, 7))

    machine.run(following)

    assert following.cached_tokens == 12


@pytest.mark.parametrize(
    ("salts", "is_enabled"), [(("a", "b"), True), (("a", "a"), False)], ids=["salt", "disabled"]
)
def test_pages_are_not_shared_across_salts_or_where_sharing_is_off(salts, is_enabled):
    machine = Machine(limits=SchedulerLimits(is_prefix_cached=is_enabled))
    machine.run(sequence_of(range(11), salt=salts[0]))
    second = sequence_of(range(11), salt=salts[1])

    machine.run(second)

    assert second.cached_tokens == 0
    machine.assert_empty()


def test_the_longest_unused_pages_make_room_first():
    machine = Machine(pages=8)
    for start in (0, 100):
        machine.run(sequence_of(range(start, start + 9), max_tokens=1))
    # used again, so that the other prompt is the older one
    machine.run(sequence_of(range(9), max_tokens=1))
    machine.run(sequence_of(range(200, 220), max_tokens=1))
    kept, lost = sequence_of(range(9), max_tokens=1), sequence_of(range(100, 109), max_tokens=1)

    machine.run(kept)
    machine.run(lost)

    assert (kept.cached_tokens, lost.cached_tokens) == (8, 0)


def test_answers_to_one_prompt_compute_it_once():
    machine = Machine()
    first, *others = [
        sequence_of(range(13), sampling=SamplingParams(seed=seed)) for seed in range(4)
    ]
    for each in others:
        each.follow(first)

    machine.run(first, *others)

    assert [each.cached_tokens for each in others] == [12, 12, 12]
    assert all(each.tokens == answer_alone(each) for each in (first, *others))
    assert len({tuple(each.tokens) for each in (first, *others)}) == 4


def test_the_youngest_gives_way_where_pages_run_out_and_draws_the_same_tokens_later():
    machine = Machine(pages=8, limits=SchedulerLimits(is_prefix_cached=False))
    old, young = [
        sequence_of(range(at, at + 6), max_tokens=18, sampling=SamplingParams(seed=at))
        for at in (0, 50)
    ]

    machine.run(old, young)

    assert machine.scheduler.counts.preemptions >= 1
    assert (old.tenure, young.tenure) == (1, 1 + machine.scheduler.counts.preemptions)
    assert old.tokens == answer_alone(old)
    assert young.tokens == answer_alone(young)
    machine.assert_empty()


def test_tenants_take_turns_and_each_is_served_in_order():
    machine = Machine(max_sequences=1)
    waiting = [sequence_of(max_tokens=1, tenant=tenant) for tenant in "aaaabbc"]

    machine.scheduler.add(waiting)
    served = []
    while machine.scheduler.waiting or machine.flights:
        planned = machine.turn()
        served += [] if planned is None else planned.started

    assert [each.tenant for each in served] == list("abcabaa")
    assert [each.order for each in served] == [0, 4, 6, 1, 5, 2, 3]


def test_a_short_prompt_of_another_tenant_does_not_wait_for_a_long_one():
    machine = Machine(limits=SchedulerLimits(max_step_tokens=16), context_length=999, pages=99)
    long = sequence_of(range(200), max_tokens=1, tenant="a")
    short = sequence_of(range(50, 58), max_tokens=1, tenant="b")
    machine.scheduler.add([long])
    machine.turn()
    machine.scheduler.add([short])

    planned = machine.launch()

    assert [step.count for step in planned.plan.steps] == [8, 8]


def test_small_prompts_do_not_keep_a_large_one_waiting_for_ever():
    machine = Machine(pages=16, max_sequences=8)
    line = [sequence_of(range(at, at + 4), max_tokens=9) for at in range(12)]
    large = sequence_of(range(100, 155), max_tokens=2)
    machine.scheduler.add(line[:6])
    machine.turn()
    machine.scheduler.add([large])
    added = 6

    turns = 0
    while large.state is not SequenceState.FINISHED:
        machine.turn()
        turns += 1
        if turns % 3 == 0:
            # new ones never end
            machine.scheduler.add([sequence_of((turns % 200, 1, 2), max_tokens=9)])
            added += 1
        assert turns < 100

    assert large.tokens == answer_alone(large)


def test_too_many_waiting_sequences_are_refused_together():
    machine = Machine(max_sequences=2, limits=SchedulerLimits(max_waiting=1))
    machine.scheduler.add([sequence_of(), sequence_of()])

    with pytest.raises(EngineOverloaded, match="2 requests would wait and at most 1") as caught:
        machine.scheduler.add([sequence_of(), sequence_of()])

    assert (caught.value.waiting, caught.value.limit) == (2, 1)
    assert machine.scheduler.waiting == 2


def test_too_many_waiting_prompt_tokens_are_refused_but_one_large_prompt_is_not():
    machine = Machine(limits=SchedulerLimits(max_waiting_tokens=10))
    machine.scheduler.add([sequence_of(range(40))])

    with pytest.raises(EngineOverloaded, match="43 prompt tokens"):
        machine.scheduler.add([sequence_of()])


def test_a_step_must_have_room_for_a_prompt_beside_all_sequences():
    with pytest.raises(ValueError, match="max_step_tokens = 4 leaves no room"):
        Machine(limits=SchedulerLimits(max_step_tokens=4))


def test_a_guided_sequence_waits_for_its_last_token_while_others_go_on():
    guide = Guide(kind=GuideKind.REGEX, text="a*")
    guided = sequence_of((5, 6), sampling=SamplingParams(temperature=0, seed=0, guide=guide))
    plain = sequence_of()
    machine = Machine()
    machine.scheduler.add([guided, plain])

    planned = [machine.launch(), machine.launch()]

    assert [each.sequences for each in planned] == [(guided, plain), (plain,)]


def test_drafts_are_verified_in_one_step_and_change_nothing():
    machine = Machine()
    sequence = sequence_of((1, 2, 3, 1, 2, 3), max_tokens=120, draft_tokens=4)

    machine.run(sequence)

    assert sequence.tokens == answer_alone(sequence)
    assert machine.scheduler.counts.drafts_accepted > 20
    assert machine.scheduler.counts.drafts_proposed > machine.scheduler.counts.drafts_accepted
    assert len(machine.runner.plans) == 120 - machine.scheduler.counts.drafts_accepted
    machine.assert_empty()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=0),
        SamplingParams(temperature=0, seed=0, frequency_penalty=1.0),
        SamplingParams(temperature=0, seed=0, logprobs=0),
    ],
)
def test_only_plain_greedy_answers_are_guessed(sampling):
    assert sequence_of(sampling=sampling, draft_tokens=4).draft_tokens == 0


def test_a_sequence_that_was_never_started_can_be_given_up():
    machine = Machine(max_sequences=1)
    running, waiting = sequence_of(max_tokens=3), sequence_of()
    machine.scheduler.add([running, waiting])
    machine.turn()

    machine.scheduler.finish(waiting)
    machine.scheduler.finish(waiting)

    assert machine.scheduler.waiting == 0
    assert machine.scheduler.running == (running,)


@pytest.mark.parametrize("seed", range(6))
def test_random_loads_leave_no_page_and_answer_as_alone(seed):
    rng = random.Random(seed)  # noqa: S311
    machine = Machine(
        overlaps=seed % 3 > 0,
        max_sequences=rng.choice([1, 3, 6]),
        pages=rng.choice([16, 20, 40]),
        page_size=rng.choice([2, 4]),
        limits=SchedulerLimits(max_step_tokens=rng.choice([7, 16, 64]), max_waiting=1000),
    )
    live, ended, given_up = [], [], 0
    room = machine.runner.pages * machine.runner.page_size
    for _ in range(250):
        sequence = random_sequence(rng, room)
        machine.scheduler.add([sequence])
        live.append(sequence)
        for _ in range(rng.randrange(5)):
            machine.turn()
        if rng.random() < 0.15:
            victim = live.pop(rng.randrange(len(live)))
            given_up += victim.state is not SequenceState.FINISHED
            machine.scheduler.finish(victim)
        ended += [each for each in live if each.state is SequenceState.FINISHED]
        live = [each for each in live if each.state is not SequenceState.FINISHED]
    while live or machine.flights:
        machine.turn()
        ended += [each for each in live if each.state is SequenceState.FINISHED]
        live = [each for each in live if each.state is not SequenceState.FINISHED]

    assert given_up > 0
    assert [each.tokens for each in ended] == [answer_alone(each) for each in ended]
    machine.assert_empty()


def random_sequence(rng, room):
    prompt = [rng.randrange(3)] * rng.randrange(1, 9) + [rng.randrange(250)] * rng.randrange(3)
    is_guided = rng.random() < 0.1
    return sequence_of(
        prompt,
        max_tokens=rng.randrange(1, room - len(prompt) + 1)
        if rng.random() < 0.1
        else rng.randrange(1, 9),
        sampling=SamplingParams(
            temperature=rng.choice([0, 1.0]),
            seed=rng.randrange(3),
            guide=Guide(kind=GuideKind.JSON_OBJECT) if is_guided else None,
        ),
        tenant=rng.choice("aab"),
        salt=rng.choice("xy"),
        draft_tokens=rng.choice([0, 0, 3]),
    )


@pytest.mark.parametrize(
    ("demand", "tokens", "shares"),
    [
        ({"a": 100}, 16, {"a": 16}),
        ({"a": 100, "b": 100}, 16, {"a": 8, "b": 8}),
        ({"a": 100, "b": 2, "c": 100}, 16, {"a": 7, "b": 2, "c": 7}),
        ({"a": 3, "b": 2}, 16, {"a": 3, "b": 2}),
        ({"a": 9, "b": 9}, 0, {"a": 0, "b": 0}),
        ({}, 16, {}),
    ],
)
def test_what_one_tenant_does_not_need_the_others_get(demand, tokens, shares):
    assert share_tokens(demand, tokens) == shares
