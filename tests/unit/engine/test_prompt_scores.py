"""Prompts that are scored in the steps of others, by a runner that scores by hashes."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import (
    CacheExceeded,
    ContextLengthExceeded,
    DeviceFailed,
    EngineError,
    EngineOverloaded,
    NoTokenDrawn,
)
from engine.inference.batching import BatchingEngine
from engine.inference.limits import SchedulerLimits
from engine.inference.request import GenerationRequest, RequestInvalid
from engine.inference.sequence import TokenSequence
from engine.inference.steps import Drawn, TokenLogprobs
from engine.inference.text import TextCodec
from tests.tiny_llama import save_tiny_tokenizer
from tests.unit.engine.hashing_runner import HashingRunner, scores_of, step_gate
from tests.unit.engine.test_batching import break_once, wait_until, wait_until_empty
from tests.unit.engine.test_scheduler import GREEDY, Machine, sequence_of


def prompt_of(length, seed=0):
    rng = random.Random(seed)  # noqa: S311
    return tuple(rng.randrange(256) for _ in range(length))


def never():
    return False


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return TextCodec.from_directory(save_tiny_tokenizer(tmp_path_factory.mktemp("text")))


@pytest.fixture
def open_engine(codec):
    """Opens engines over given runners and closes them at the end."""
    opened = []

    def open_one(runner=None, **options):
        runner = runner or HashingRunner()
        opened.append((runner, BatchingEngine(runner, codec, **options)))
        return opened[-1][1]

    yield open_one
    for runner, engine in opened:
        if runner.gate is not None:
            runner.gate.release(10_000)
        engine.close()


def scored(*args, **fields):
    return TokenSequence.to_be_scored(*args, **fields)


def plans_of(machine):
    return [
        [(step.start, step.count, len(step.score_ids)) for step in plan.steps]
        for plan in machine.runner.plans
    ]


class ScoringMachine(Machine):
    """Also collects scores and ends the sequences that have all of theirs."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.scores = {}

    def is_complete(self, sequence, drawn):
        if sequence.score_top is None:
            return super().is_complete(sequence, drawn)
        found = self.scores.setdefault(sequence, [None])
        found += drawn.scores
        return len(found) == len(sequence.prompt_ids)

    def check(self, sequence):
        assert tuple(self.scores[sequence]) == scores_of(sequence.prompt_ids, sequence.score_top)


# engine


@pytest.mark.parametrize("length", [1, 2, 4, 5, 128, 129, 130, 240])
@pytest.mark.parametrize("top", [0, 3])
def test_every_token_of_a_prompt_is_scored_but_the_first(open_engine, length, top):
    runner = HashingRunner()
    engine, prompt = open_engine(runner), prompt_of(length)

    assert engine.score_prompt(prompt, top, never) == scores_of(prompt, top)
    wait_until_empty(engine, runner)


def test_a_prompt_that_fills_the_context_is_scored(open_engine):
    prompt = prompt_of(32)
    engines = [open_engine(HashingRunner(context_length=32)), open_engine(HashingRunner(pages=8))]

    for engine in engines:
        assert engine.score_prompt(prompt, 1, never) == scores_of(prompt, 1)


def test_what_cannot_be_scored_is_refused_at_once(open_engine):
    engine = open_engine(HashingRunner(context_length=32))

    with pytest.raises(ContextLengthExceeded, match=r"prompt: 33 tokens .* context of 32"):
        engine.score_prompt(prompt_of(33), 1, never)
    with pytest.raises(CacheExceeded, match="cache of 16"):
        open_engine(HashingRunner(pages=4)).score_prompt(prompt_of(17), 1, never)
    with pytest.raises(RequestInvalid, match=r"prompt = 260 .* below 260"):
        engine.score_prompt((1, 260), 1, never)
    with pytest.raises(RequestInvalid, match="logprobs = 21"):
        engine.score_prompt((1, 2), 21, never)
    with pytest.raises(RequestInvalid, match="at least one token"):
        engine.score_prompt((), 1, never)


def test_a_caller_that_goes_away_gets_what_there_is_and_frees_its_slot(open_engine):
    runner = HashingRunner(context_length=1024, pages=256)
    runner.gate = step_gate()
    engine, gone, prompt = open_engine(runner), threading.Event(), prompt_of(1000)
    with ThreadPoolExecutor(1) as caller:
        outcome = caller.submit(engine.score_prompt, prompt, 1, gone.is_set)
        wait_until(lambda: len(runner.plans) == 2, "no step is launched behind the first")
        runner.gate.release(1)
        wait_until(lambda: len(runner.plans) == 3, "no step is launched behind the second")
        gone.set()
        runner.gate.release(10)

        found = outcome.result(10)

    assert 1 < len(found) < 1000
    assert found == scores_of(prompt, 1)[: len(found)]
    wait_until_empty(engine, runner)
    assert len(runner.plans) <= 4


def test_closing_ends_scores_and_takes_no_new_ones(open_engine):
    runner = HashingRunner(context_length=1024, pages=256)
    runner.gate = step_gate()
    engine = open_engine(runner)
    with ThreadPoolExecutor(1) as caller:
        outcome = caller.submit(engine.score_prompt, prompt_of(1000), 1, never)
        wait_until(lambda: runner.plans, "no step is launched")
        runner.gate.release(10_000)
        engine.close()

        with pytest.raises(EngineError, match="unloaded"):
            outcome.result(10)
    for length in (1, 9):
        with pytest.raises(EngineError, match="unloaded"):
            engine.score_prompt(prompt_of(length), 1, never)


def test_a_fault_fails_what_was_being_scored_and_the_next_prompt_is_scored(open_engine):
    runner, spare = HashingRunner(), HashingRunner()
    runner.fault = break_once(1)
    engine, prompt = open_engine(runner, reopen=lambda: spare), prompt_of(200)

    with pytest.raises(DeviceFailed, match="send it again"):
        engine.score_prompt(prompt, 1, never)

    assert engine.score_prompt(prompt, 1, never) == scores_of(prompt, 1)
    wait_until_empty(engine, spare)


def test_scores_wait_within_the_limits_of_the_queue(open_engine):
    runner = HashingRunner(max_sequences=1)
    runner.gate = step_gate()
    engine = open_engine(runner, limits=SchedulerLimits(max_waiting=1))
    taken = [
        engine.generate(GenerationRequest(prompt_ids=(1, 2), max_tokens=4, ignore_eos=True))
        for _ in range(2)
    ]

    with pytest.raises(EngineOverloaded):
        engine.score_prompt(prompt_of(9), 1, never)
    runner.gate.release(10_000)

    assert [len(list(each)) for each in taken] == [4, 4]


def test_a_score_that_is_not_finite_fails_its_own_request(open_engine):
    class SickRunner(HashingRunner):
        def _score(self, step):
            if self._read(step, 1) == (13,):
                nan = TokenLogprobs(token_id=1, logprob=float("nan"), top=())
                return Drawn(scores=(nan,) * len(step.score_ids))
            return super()._score(step)

    runner = SickRunner()
    engine = open_engine(runner)

    with pytest.raises(NoTokenDrawn):
        engine.score_prompt((13, 1, 2), 1, never)

    assert engine.score_prompt((12, 1, 2), 1, never) == scores_of((12, 1, 2), 1)
    wait_until_empty(engine, runner)


def test_pages_of_a_scored_prompt_are_found_under_its_tenant_or_salt(open_engine):
    engine, prompt = open_engine(), prompt_of(40)
    engine.score_prompt(prompt, 0, never, tenant="a")
    engine.score_prompt(prompt, 0, never, tenant="b", cache_salt="s")

    def cached(**fields):
        request = GenerationRequest(prompt_ids=prompt, max_tokens=1, **fields)
        return [chunk.cached_tokens for chunk in engine.generate(request)]

    assert cached(tenant="b") == [0]
    assert cached(tenant="a") == [36]
    assert cached(tenant="c", cache_salt="s") == [36]


@pytest.mark.parametrize(
    "shape",
    [{"max_sequences": 8, "pages": 64}, {"max_sequences": 3, "pages": 300}],
    ids=["few pages", "few slots"],
)
def test_many_callers_score_and_generate_at_once(open_engine, shape):
    runner = HashingRunner(**shape)
    engine = open_engine(runner, limits=SchedulerLimits(max_step_tokens=200, max_waiting=1000))
    alone = {}

    def call(number):
        rng = random.Random(number)  # noqa: S311
        prompt = prompt_of(rng.randrange(1, 250), number % 5)
        tenant = rng.choice("ab")
        if number % 3 == 0:
            request = GenerationRequest(
                prompt_ids=prompt[:40], max_tokens=20, seed=number, tenant=tenant, ignore_eos=True
            )
            tokens = [chunk.token_id for chunk in engine.generate(request)]
            alone[number] = (request, tokens)
            return
        asked = iter(range(rng.choice([3, 10**6, 10**6])))
        found = engine.score_prompt(prompt, 2, lambda: next(asked, None) is None, tenant=tenant)
        assert found == scores_of(prompt, 2)[: len(found)]
        assert len(found) == len(prompt) or next(asked, None) is None

    with ThreadPoolExecutor(12) as callers:
        list(callers.map(call, range(90)))

    wait_until_empty(engine, runner)
    for request, tokens in alone.values():
        assert [chunk.token_id for chunk in engine.generate(request)] == tokens


# scheduler


def test_a_scored_prompt_enters_in_chunks_beside_decoding_sequences_and_other_prompts():
    machine = ScoringMachine(context_length=999, pages=400)
    decoding, long = sequence_of(max_tokens=30), scored(prompt_of(300), 1)
    machine.scheduler.add([decoding])
    machine.turn()
    machine.scheduler.add([long, sequence_of(prompt_of(500), max_tokens=1)])

    machine.run()
    while machine.scheduler.running:
        machine.turn()

    # of 300 tokens the last is not computed; the other prompt has the rest of the step
    assert plans_of(machine)[1:4] == [
        [(3, 1, 0), (0, 128, 128), (0, 500, 0)],
        [(4, 1, 0), (128, 128, 128)],
        [(5, 1, 0), (256, 43, 43)],
    ]
    machine.check(long)


def test_scores_are_shared_between_tenants_and_those_that_find_none_do_not_start():
    machine = ScoringMachine(context_length=999, pages=400, max_sequences=5)
    long, late = scored(prompt_of(400), 1, tenant="a"), scored(prompt_of(9), 1, tenant="a")
    other = scored(prompt_of(400, 1), 1, tenant="b")
    machine.scheduler.add([long, late, other])
    machine.turn()

    assert plans_of(machine) == [[(0, 64, 64), (0, 64, 64)]]
    assert machine.scheduler.running == (long, other)
    machine.run(sequence_of(tenant="a"))
    while machine.scheduler.running:
        machine.turn()
    for each in (long, late, other):
        machine.check(each)
    machine.assert_empty()


def test_pages_of_others_are_not_taken_for_tokens_that_are_to_be_scored():
    machine, prompt = ScoringMachine(), prompt_of(40)
    machine.run(sequence_of(prompt, max_tokens=1))
    again = scored(prompt, 2)

    machine.run(again)

    machine.check(again)
    assert machine.scheduler.counts.prefix_hits == 0


def test_a_preempted_prompt_scores_only_what_was_not_scored_before():
    # so few tokens a step that the older one takes the last pages meanwhile
    machine = ScoringMachine(
        pages=63, page_size=4, overlaps=False, limits=SchedulerLimits(max_step_tokens=10)
    )
    old, young = sequence_of((1,), max_tokens=100), scored(prompt_of(240), 1)
    machine.scheduler.add([old])
    machine.turn()
    machine.scheduler.add([young])

    while machine.scheduler.waiting or machine.scheduler.running:
        machine.turn()

    steps = [entry for plan in plans_of(machine) for entry in plan]
    assert machine.scheduler.counts.preemptions == 1
    assert sum(scores for _, _, scores in steps) == 239
    assert sum(count for _, count, _ in steps) > 239 + 100
    machine.check(young)
    machine.assert_empty()


@pytest.mark.parametrize("seed", range(4))
def test_random_loads_with_scores_leave_no_page_and_no_token_unscored(seed):
    rng = random.Random(seed)  # noqa: S311
    machine = ScoringMachine(
        overlaps=seed % 3 > 0,
        max_sequences=rng.choice([3, 6]),
        pages=rng.choice([55, 70]),
        limits=SchedulerLimits(max_step_tokens=rng.choice([7, 40, 400]), max_waiting=1000),
    )
    live, given_up = [], 0
    for _ in range(60):
        tenant = rng.choice("aab")
        if rng.random() < 0.6:
            prompt = prompt_of(rng.randrange(2, 200), rng.randrange(3))
            sequence = scored(prompt, rng.randrange(3), tenant=tenant)
        else:
            sequence = sequence_of(
                prompt_of(rng.randrange(1, 60), rng.randrange(3)),
                max_tokens=rng.randrange(1, 150),
                sampling=GREEDY,
                tenant=tenant,
            )
        machine.scheduler.add([sequence])
        live.append(sequence)
        for _ in range(rng.randrange(6)):
            machine.turn()
        if rng.random() < 0.1:
            victim = live.pop(rng.randrange(len(live)))
            given_up += 1
            machine.scheduler.finish(victim)
    while machine.scheduler.waiting or machine.scheduler.running or machine.flights:
        machine.turn()
    whole = [each for each in live if each.score_top is not None]

    assert given_up > 0
    assert machine.scheduler.counts.preemptions > 0
    assert whole
    for each in whole:
        machine.check(each)
    machine.assert_empty()


def test_no_tenant_is_kept_from_its_scores_by_one_that_always_has_more():
    machine = ScoringMachine(context_length=999, pages=400, max_sequences=2)
    short = scored(prompt_of(30), 1, tenant="b")
    machine.scheduler.add([scored(prompt_of(200, seed), 1, tenant="a") for seed in range(9)])
    machine.turn()
    machine.scheduler.add([short])

    turns = 0
    while short not in machine.scores:
        machine.turn()
        turns += 1

    assert turns < 6
