import random
import threading
import time
import weakref

import pytest

from engine.errors import (
    CacheExceeded,
    ContextLengthExceeded,
    DeviceFailed,
    EngineError,
    EngineOverloaded,
)
from engine.inference.answer import Answer
from engine.inference.batching import BatchingEngine
from engine.inference.limits import SchedulerLimits
from engine.inference.request import FinishReason, GenerationRequest, RequestInvalid
from engine.inference.sampling_params import Guide, GuideKind
from engine.inference.steps import Drawn
from engine.inference.text import TextCodec
from tests.tiny_llama import save_tiny_llama
from tests.unit.engine.hashing_runner import HashingRunner, next_token, step_gate

PROMPT = tuple(range(40, 52))


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return TextCodec.from_directory(save_tiny_llama(tmp_path_factory.mktemp("model")))


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


def request_of(**fields):
    given = {"prompt_ids": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return GenerationRequest(**{**given, **fields})


def text_of(chunks, index=0):
    return "".join(each.text for each in chunks if each.index == index)


def answer_alone(request, codec, index=0, limit=10**9):
    """Text, tokens and end of an answer, drawn without engine and scheduler."""
    sampling = request.sampling((request.seed or 0) + index, codec.eos_ids)
    room = limit - len(request.prompt_ids)
    answer = Answer(request, request.max_tokens or room, codec)
    tokens, text, reason = list(request.prompt_ids), "", None
    while reason is None:
        tokens.append(next_token(tuple(tokens), sampling))
        chunk = answer.accept(tokens[-1])
        text, reason = text + chunk.text, chunk.finish_reason
    return text, tuple(tokens[len(request.prompt_ids) :]), reason


def outcome_of(chunks, index=0):
    mine = [each for each in chunks if each.index == index]
    assert [each.completion_tokens for each in mine] == list(range(1, len(mine) + 1))
    assert [each.finish_reason for each in mine[:-1]] == [None] * (len(mine) - 1)
    return text_of(mine, index), tuple(each.token_id for each in mine), mine[-1].finish_reason


def wait_until(condition, message):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.001)


def wait_until_empty(engine, runner):
    wait_until(
        lambda: not runner.open_slots and engine.statistics().running == 0, "slots stay open"
    )
    statistics = engine.statistics()
    assert (statistics.waiting, statistics.kv_usage) == (0, 0)


def test_an_answer_is_that_of_the_tokens_one_by_one(open_engine, codec):
    request = request_of()

    chunks = list(open_engine().generate(request))

    assert outcome_of(chunks) == answer_alone(request, codec)


def test_a_stop_string_and_a_stop_token_end_the_answer(open_engine, codec):
    engine = open_engine()
    text, tokens, _ = answer_alone(request_of(max_tokens=20, temperature=1, seed=3), codec)
    asked = request_of(max_tokens=20, temperature=1, seed=3)

    by_text = list(engine.generate(request_of(**fields_of(asked), stop=(text[3:5],))))
    by_token = list(engine.generate(request_of(**fields_of(asked), stop_token_ids=(tokens[7],))))

    assert text_of(by_text) == text[: text.find(text[3:5])]
    assert by_text[-1].finish_reason is by_token[-1].finish_reason is FinishReason.STOP
    assert by_token[-1].completion_tokens == tokens.index(tokens[7]) + 1


def fields_of(request):
    names = ("prompt_ids", "max_tokens", "temperature", "seed", "ignore_eos")
    return {name: getattr(request, name) for name in names}


def test_several_answers_have_seeds_in_a_row_and_share_the_prompt(open_engine, codec):
    request = request_of(n=3, temperature=1, seed=2**63 - 2)

    chunks = list(open_engine().generate(request))

    seeds = [2**63 - 2, 2**63 - 1, -(2**63)]
    for index, seed in enumerate(seeds):
        alone = answer_alone(request_of(temperature=1, seed=seed), codec)
        assert outcome_of(chunks, index) == alone
    cached = [max(c.cached_tokens for c in chunks if c.index == index) for index in range(3)]
    assert cached == [0, 8, 8]


def test_log_probabilities_come_with_their_tokens(open_engine):
    chunks = list(open_engine().generate(request_of(logprobs=0)))

    assert [each.logprobs.token_id for each in chunks] == [each.token_id for each in chunks]


def test_without_a_limit_what_fits_context_and_cache_is_filled(open_engine):
    small_cache = open_engine(HashingRunner(pages=10, page_size=4))
    small_context = open_engine(HashingRunner(context_length=30))

    filled = [
        list(each.generate(request_of(max_tokens=None))) for each in (small_cache, small_context)
    ]

    assert [each[-1].completion_tokens for each in filled] == [40 - 12, 30 - 12]
    assert (small_cache.context_length, small_context.context_length) == (40, 30)


def test_what_never_fits_is_refused_at_once(open_engine):
    with pytest.raises(CacheExceeded, match=r"max_tokens: 41 tokens .* key-value cache of 40"):
        open_engine(HashingRunner(pages=10)).generate(request_of(max_tokens=29))
    with pytest.raises(ContextLengthExceeded, match=r"prompt: 12 tokens .* context of 12"):
        open_engine(HashingRunner(context_length=12)).generate(request_of())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_ids": (1, 260)}, "prompt"),
        ({"prompt_ids": (-1, 2)}, "prompt"),
        ({"stop_token_ids": (260,)}, "stop_token_ids"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
    ],
)
def test_an_id_beyond_the_vocabulary_is_refused(open_engine, fields, field):
    with pytest.raises(RequestInvalid, match="below 260") as caught:
        open_engine().generate(request_of(**fields))
    assert caught.value.field == field


@pytest.mark.parametrize("how", ["callable", "close", "forget", "ticket"])
def test_a_caller_that_goes_away_frees_its_slot_within_one_step(open_engine, how):
    runner = HashingRunner(context_length=10_000, pages=4000)
    runner.gate = step_gate()
    engine = open_engine(runner)
    is_gone = threading.Event()
    chunks = engine.generate(request_of(max_tokens=5000), is_gone.is_set)
    ticket = engine.submit(request_of(max_tokens=5000), lambda _: None)
    runner.gate.release(3)
    first = next(chunks)
    # the fourth step runs and the fifth is launched behind it
    wait_until(lambda: len(runner.plans) == 5, "no step is launched while another runs")

    match how:
        case "callable":
            is_gone.set()
        case "close":
            chunks.close()
        case "forget":
            del chunks
        case "ticket":
            ticket.cancel()
    runner.gate.release(2)

    wait_until(lambda: len(runner.open_slots) == 1, "the slot stays open")
    assert [len(plan.steps) for plan in runner.plans[3:6]] == [2, 2, 1]
    assert first.finish_reason is None


def test_a_cancelled_answer_says_so(open_engine):
    asked = iter([False] * 4 + [True])

    chunks = list(open_engine().generate(request_of(max_tokens=200), lambda: next(asked)))

    assert chunks[-1].finish_reason is FinishReason.CANCELLED
    assert chunks[-1].token_id is None
    assert len(chunks) <= 5


def test_a_request_beyond_the_limit_is_refused_and_the_others_are_answered(open_engine):
    runner = HashingRunner(max_sequences=1)
    runner.gate = step_gate()
    engine = open_engine(runner, limits=SchedulerLimits(max_waiting=1))
    taken = [engine.generate(request_of()) for _ in range(2)]

    with pytest.raises(EngineOverloaded):
        engine.generate(request_of())
    runner.gate.release(10_000)

    assert [len(list(each)) for each in taken] == [6, 6]


def test_a_value_that_is_not_finite_fails_its_own_request(open_engine, codec):
    runner = SickRunner()
    engine = open_engine(runner)
    sick = engine.generate(request_of(prompt_ids=(13,) * 5))
    healthy = engine.generate(request_of())

    with pytest.raises(EngineError, match="not finite"):
        list(sick)

    assert outcome_of(list(healthy)) == answer_alone(request_of(), codec)
    wait_until_empty(engine, runner)


class SickRunner(HashingRunner):
    """Draws no token behind a prompt of thirteens."""

    def _draw(self, step):
        drawn = super()._draw(step)
        is_sick = self._read(step, 1) == (13,)
        return Drawn(token_ids=(-1,)) if is_sick else drawn


@pytest.mark.parametrize("n", [1, 3])
def test_what_the_runner_refuses_to_open_fails_alone(open_engine, codec, n):
    runner = HashingRunner()
    runner.refuses, runner.gate = (7, 7), step_gate()
    engine = open_engine(runner)
    before = engine.generate(request_of())
    refused = engine.generate(request_of(prompt_ids=(7, 7), n=n))
    after = engine.generate(request_of(seed=1))

    runner.gate.release(10_000)

    with pytest.raises(EngineError, match="cannot be followed"):
        list(refused)
    for stream in (before, after):
        assert outcome_of(list(stream)) == answer_alone(request_of(), codec)
    assert engine.statistics().faults == 0
    wait_until_empty(engine, runner)


def test_a_step_of_which_nothing_is_left_stops_nobody(open_engine, codec):
    runner = HashingRunner()
    runner.refuses = (7, 7)
    engine = open_engine(runner)

    with pytest.raises(EngineError, match="cannot be followed"):
        list(engine.generate(request_of(prompt_ids=(7, 7))))

    wait_until_empty(engine, runner)
    assert outcome_of(list(engine.generate(request_of()))) == answer_alone(request_of(), codec)


@pytest.mark.parametrize(
    ("count", "n", "field", "remedy"),
    [
        (3, 4, "n", "use up to 3 for 3 prompts"),
        (11, 1, "n", "send fewer prompts"),
        (2, 5, "prompt", "send fewer prompts at once"),
    ],
)
def test_what_never_finds_room_together_is_refused_for_good(open_engine, count, n, field, remedy):
    limits = SchedulerLimits(max_waiting=6, max_waiting_tokens=9 * len(PROMPT))
    engine = open_engine(limits=limits)

    with pytest.raises(RequestInvalid, match=remedy) as caught:
        engine.check_together([request_of(n=n)] * count)

    assert caught.value.field == field


def test_what_just_finds_room_together_and_any_single_request_are_answered(open_engine):
    engine = open_engine(limits=SchedulerLimits(max_waiting=6))
    several, single = [request_of(n=5)] * 2, [request_of(n=16)]

    for requests in (several, single):
        engine.check_together(requests)
        streams = [engine.generate(each) for each in requests]
        ended = [each for stream in streams for each in stream if each.finish_reason]
        assert len(ended) == sum(each.n for each in requests)


def test_a_guide_is_checked_before_its_request_is_taken(open_engine):
    def check(guide):
        if guide.text == "(":
            raise RequestInvalid("guided_regex", guide.text, "close the bracket")

    guides = [Guide(kind=GuideKind.REGEX, text=text) for text in "(a"]
    engine = open_engine(check_guide=check)

    with pytest.raises(RequestInvalid, match="close the bracket"):
        engine.generate(request_of(guide=guides[0], ignore_eos=False))
    assert list(engine.generate(request_of(guide=guides[1], ignore_eos=False)))
    with pytest.raises(RequestInvalid, match=r"guide = 'regex' .* follows no guides"):
        open_engine().generate(request_of(guide=guides[1], ignore_eos=False))


def test_a_caller_whose_function_fails_disturbs_nobody_else(open_engine, codec):
    def fail(_):
        raise RuntimeError("the event loop is closed")

    def refuse_to_say():
        raise RuntimeError("no idea")

    runner = HashingRunner()
    engine = open_engine(runner)
    engine.submit(request_of(), fail)
    unsure = engine.generate(request_of(), refuse_to_say)

    with pytest.raises(EngineError, match="could not be delivered"):
        list(unsure)
    assert outcome_of(list(engine.generate(request_of()))) == answer_alone(request_of(), codec)
    wait_until_empty(engine, runner)


def break_once(plan_number):
    """A fault at one launch."""
    numbers = iter(range(10**9))

    def fault(_):
        if next(numbers) == plan_number:
            raise RuntimeError("illegal memory access")

    return fault


def test_after_a_fault_what_ran_fails_and_what_waited_is_answered_by_a_new_runner(
    open_engine, codec
):
    runner, spare = HashingRunner(max_sequences=1), HashingRunner(max_sequences=1)
    runner.gate, runner.fault = step_gate(), break_once(2)
    engine = open_engine(runner, reopen=lambda: spare)
    running, waiting = engine.generate(request_of()), engine.generate(request_of(seed=1))

    runner.gate.release(10_000)

    with pytest.raises(DeviceFailed, match="send it again") as caught:
        list(running)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert outcome_of(list(waiting)) == answer_alone(request_of(), codec)
    assert engine.end is None
    assert engine.statistics().faults == 1
    wait_until_empty(engine, spare)


class BrokenGate:
    """Lets a step end by an error."""

    def acquire(self, timeout):
        raise RuntimeError("the device is gone")

    def release(self, count):
        pass


def test_a_fault_that_shows_only_in_the_result_fails_what_ran_too(open_engine, codec):
    runner, spare = HashingRunner(), HashingRunner()
    runner.gate = BrokenGate()
    engine = open_engine(runner, reopen=lambda: spare)

    with pytest.raises(DeviceFailed):
        list(engine.generate(request_of(n=2)))

    assert outcome_of(list(engine.generate(request_of()))) == answer_alone(request_of(), codec)
    wait_until_empty(engine, spare)


def test_a_failed_runner_is_gone_before_a_new_one_is_made(open_engine):
    alive = []

    def reopen():
        alive.append(first() is not None)
        return HashingRunner()

    runner = HashingRunner()
    runner.fault = break_once(1)
    first = weakref.ref(runner)
    engine = BatchingEngine(runner, open_engine().text, reopen=reopen)
    del runner

    with pytest.raises(DeviceFailed):
        list(engine.generate(request_of()))
    list(engine.generate(request_of()))
    engine.close()

    assert alive == [False]


@pytest.mark.parametrize("reopens", ["never", "fails", "differs"])
def test_a_fault_that_cannot_be_undone_closes_the_engine_and_says_so(open_engine, reopens):
    def fail():
        raise RuntimeError("no device")

    reopen = {
        "never": None,
        "fails": fail,
        "differs": lambda: HashingRunner(max_sequences=1, pages=5),
    }[reopens]
    runner = HashingRunner(max_sequences=1)
    runner.gate, runner.fault = step_gate(), break_once(2)
    engine = open_engine(runner, reopen=reopen)
    running, waiting = engine.generate(request_of()), engine.generate(request_of())

    runner.gate.release(10_000)

    with pytest.raises(DeviceFailed):
        list(running)
    with pytest.raises(EngineError, match="stopped after a fault"):
        list(waiting)
    with pytest.raises(EngineError, match="load the model again"):
        engine.generate(request_of())
    assert "fault" in engine.end


def test_a_fault_that_comes_again_without_a_request_at_fault_ends_the_engine(open_engine):
    def spoil(_):
        raise RuntimeError("cannot close")

    class Unclosable(HashingRunner):
        close = spoil

    opened = []
    engine = open_engine(Unclosable(), reopen=lambda: opened.append(1) or Unclosable())

    outcomes = [outcome_or_error(engine, request_of(max_tokens=1)) for _ in range(3)]

    assert all(outcomes)
    assert len(opened) <= 3


def outcome_or_error(engine, request):
    try:
        return list(engine.generate(request))
    except EngineError as error:
        return error


def test_closing_ends_running_and_waiting_requests_and_takes_no_new_ones(open_engine):
    runner = HashingRunner(max_sequences=1, context_length=10_000, pages=4000)
    engine = open_engine(runner)
    running = engine.generate(request_of(max_tokens=9000))
    waiting = engine.generate(request_of())
    next(running)

    engine.close()

    for stream in (running, waiting):
        with pytest.raises(EngineError, match="unloaded"):
            list(stream)
    with pytest.raises(EngineError, match="unloaded"):
        engine.generate(request_of())
    engine.close()


def test_a_caller_may_close_the_engine_out_of_its_own_thread(open_engine):
    engine = open_engine()
    ended = threading.Event()

    def close(item):
        engine.close()
        if isinstance(item, EngineError):
            ended.set()

    engine.submit(request_of(max_tokens=100), close)

    assert ended.wait(20)


def test_statistics_count_what_happened(open_engine):
    engine = open_engine()
    for _ in range(2):
        list(engine.generate(request_of()))

    statistics = engine.statistics()

    assert (statistics.prompt_tokens, statistics.generation_tokens) == (24, 12)
    assert (statistics.prefix_queries, statistics.prefix_hits) == (24, 8)
    assert statistics.steps >= 12
    assert 0 < statistics.last_step_s <= statistics.step_s < 20
    assert 0 <= statistics.beat_age_s < 20


def test_a_chunk_says_how_long_its_request_waited(open_engine):
    runner = HashingRunner(max_sequences=1)
    runner.gate = step_gate()
    engine = open_engine(runner)
    first, second = engine.generate(request_of()), engine.generate(request_of())

    time.sleep(0.05)
    runner.gate.release(10_000)

    waited_s = [next(first).queue_s, next(second).queue_s]
    assert waited_s[1] > max(waited_s[0], 0.05)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"max_sequences": 8, "pages": 24}, {"draft_tokens": 3}),
        ({"max_sequences": 3, "pages": 200}, {"limits": SchedulerLimits(max_step_tokens=9)}),
    ],
    ids=["few pages", "few slots"],
)
def test_thousands_of_mixed_requests_are_answered_as_one_by_one(open_engine, codec, shape, options):
    runner = HashingRunner(**shape)
    engine = open_engine(
        runner,
        **{"limits": SchedulerLimits(max_waiting=10_000), "check_guide": lambda _: None, **options},
    )
    callers = [Caller(engine, codec, seed) for seed in range(6)]

    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert [caller.error for caller in callers] == [None] * 6
    assert sum(caller.answered for caller in callers) > 900
    assert all(min(caller.refused, caller.cancelled) > 0 for caller in callers)
    wait_until_empty(engine, runner)
    statistics = engine.statistics()
    assert statistics.prefix_hits > 0
    assert statistics.discarded_tokens > 0
    assert (statistics.preemptions > 0) == (shape["pages"] < 100)
    assert (statistics.drafts_accepted > 0) == ("draft_tokens" in options)


class Caller(threading.Thread):
    """Sends requests, some bad, and leaves some in the middle."""

    def __init__(self, engine, codec, seed):
        super().__init__()
        self._engine = engine
        self._codec = codec
        self._rng = random.Random(seed)  # noqa: S311
        self.answered = self.refused = self.cancelled = 0
        self.error = None

    def run(self):
        try:
            for _ in range(70):
                self._send([self._random_fields() for _ in range(self._rng.randrange(1, 6))])
        except BaseException as error:
            self.error = error
            raise

    def _send(self, many):
        streams = []
        for fields in many:
            try:
                request = request_of(**fields)
                streams.append((request, self._engine.generate(request)))
            except (RequestInvalid, ContextLengthExceeded):
                self.refused += 1
        for request, stream in streams:
            if self._rng.random() < 0.15:
                for _ in range(self._rng.randrange(3)):
                    next(stream, None)
                stream.close()
                self.cancelled += 1
                continue
            chunks = list(stream)
            for index in range(request.n):
                alone = answer_alone(request, self._codec, index, self._engine.context_length)
                assert outcome_of(chunks, index) == alone
            self.answered += 1

    def _random_fields(self):
        rng = self._rng
        start = [rng.randrange(30, 33)] * rng.randrange(1, 12)
        fields = {
            "prompt_ids": (*start, *(rng.randrange(256) for _ in range(rng.randrange(6)))),
            "max_tokens": rng.randrange(1, 14),
            "temperature": rng.choice([0, 1.0]),
            "seed": rng.randrange(5),
            "ignore_eos": rng.random() < 0.5,
            "stop": rng.choice([(), ("a",), ("\x03",)]),
            "tenant": rng.choice("ab"),
            "n": rng.choice([1, 1, 1, 3]),
        }
        if rng.random() < 0.1:
            fields |= {"guide": Guide(kind=GuideKind.JSON_OBJECT), "ignore_eos": False}
        if rng.random() < 0.03:
            fields |= {"max_tokens": None, "n": 1}
        if rng.random() < 0.1:
            fields |= rng.choice(
                [{"prompt_ids": (999,)}, {"top_p": 7}, {"max_tokens": 10**6}, {"n": 0}]
            )
        return fields
