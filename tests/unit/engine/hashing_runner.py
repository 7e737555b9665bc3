"""A runner without a model: the next token is a hash of all tokens so far, read from its pages.

It holds the scheduler to the protocol: what lies in the pages is what earlier steps wrote, slots
are opened and closed in turn, results come in order. A plan that breaks it is an `AssertionError`.
"""

import threading
from hashlib import blake2b

from engine.errors import EngineError
from engine.inference.sampling_params import SamplingParams
from engine.inference.steps import (
    MAX_SCORED_TOKENS,
    Drawn,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

VOCABULARY = 260


def next_token(token_ids, sampling: SamplingParams, vocabulary=VOCABULARY):
    """Of few tokens where greedy, so that texts repeat themselves and drafts are accepted."""
    if sampling.is_greedy:
        # the last two tokens decide: a text that returns to a pair goes round from there
        key, size = repr((token_ids[-2:],)), 16
    else:
        key, size = repr((token_ids, sampling.seed)), vocabulary
    return int.from_bytes(blake2b(key.encode(), digest_size=4).digest()) % size


def score_of(token_ids, top):
    """The score of the last of some tokens behind the others."""

    def number(key):
        return int.from_bytes(blake2b(repr(key).encode(), digest_size=2).digest()) / 100

    likeliest = sorted(((each, -number((token_ids[:-1], each))) for each in range(top)), key=_value)
    return TokenLogprobs(
        token_id=token_ids[-1], logprob=-number(tuple(token_ids)), top=tuple(likeliest)
    )


def scores_of(token_ids, top):
    """All scores of a prompt."""
    ends = range(2, len(token_ids) + 1)
    return (None, *(score_of(tuple(token_ids[:end]), top) for end in ends))


def _value(pair):
    return -pair[1]


class HashingRunner:
    """Implements `engine.inference.steps.Runner`."""

    memory_bytes = 1000

    def __init__(
        self, *, max_sequences=4, page_size=4, pages=64, context_length=256, vocabulary=VOCABULARY
    ):
        self.max_sequences = max_sequences
        self.page_size = page_size
        self.pages = pages
        self.context_length = context_length
        self.vocabulary = vocabulary
        self.plans = []
        self.opened = []
        self.fault = None
        """Called with each plan; what it raises is raised by the launch."""
        self.refuses = None
        """A prompt that it refuses to open."""
        self.gate = None
        """A semaphore that each `wait` acquires."""
        self._cells = {}
        self._slots = {}
        self._in_flight = []

    @property
    def open_slots(self):
        return set(self._slots)

    def open(self, slot, sampling, prompt_ids, drawn_ids=()):
        assert 0 <= slot < self.max_sequences
        assert slot not in self._slots, "a slot is opened twice"
        self._slots[slot] = _Slot(sampling)
        if tuple(prompt_ids) == self.refuses:
            raise EngineError("the guide cannot be followed")
        self.opened.append((slot, tuple(prompt_ids), tuple(drawn_ids)))

    def close(self, slot):
        assert not any(slot in pending.slots for pending in self._in_flight)
        # one of a sequence whose request ended before it was opened is none
        self._slots.pop(slot, None)

    def launch(self, plan: StepPlan):
        self.plans.append(plan)
        if self.fault is not None:
            self.fault(plan)
        self._check_plan(plan)
        for step in plan.steps:
            self._write(step)
        drawn = {step.slot: self._draw(step) for step in plan.steps if step.draws}
        drawn |= {step.slot: self._score(step) for step in plan.steps if step.score_ids}
        pending = _Pending(self, {step.slot for step in plan.steps}, StepResult(drawn=drawn))
        self._in_flight.append(pending)
        assert len(self._in_flight) <= 2
        return pending

    def finish(self, pending):
        assert self._in_flight.pop(0) is pending, "results are not waited for in order"

    def _check_plan(self, plan):
        slots = [step.slot for step in plan.steps]
        assert slots
        assert len(set(slots)) == len(slots)
        decodes = [step.count == 1 and step.draws for step in plan.steps]
        assert decodes == sorted(decodes, reverse=True), "decoding sequences come first"
        scored = [step for step in plan.steps if step.score_ids]
        assert all(len(step.score_ids) <= len(step.token_ids) for step in scored)
        assert not any(step.draws for step in scored)
        assert sum(len(step.score_ids) for step in scored) <= MAX_SCORED_TOKENS
        written = [
            (step.page_ids[at // self.page_size], at % self.page_size)
            for step in plan.steps
            for at in range(step.start, step.start + step.count)
        ]
        assert len(set(written)) == len(written), "two sequences write one place"
        shared = {
            page for step in plan.steps for page in step.page_ids[: step.start // self.page_size]
        }
        assert not shared & {page for page, _ in written}, (
            "a page is read whole and written at once"
        )
        assert all(0 <= page < self.pages for step in plan.steps for page in step.page_ids)

    def _write(self, step):
        slot = self._slots[step.slot]
        tokens = step.token_ids or (slot.last,)
        assert all(0 <= each < self.vocabulary for each in tokens)
        for at, token in enumerate(tokens, step.start):
            # a position with the whole past of the token, so that a wrong page is noticed
            before = self._read(step, at)
            self._cells[step.page_ids[at // self.page_size], at % self.page_size] = (
                *before,
                token,
            )

    def _read(self, step, end):
        """The tokens that the pages hold for the first `end` positions."""
        if end == 0:
            return ()
        at = end - 1
        past = self._cells[step.page_ids[at // self.page_size], at % self.page_size]
        assert len(past) == end
        for at in range(0, end, self.page_size):
            cell = self._cells[step.page_ids[at // self.page_size], 0]
            assert cell == past[: at + 1], "a page holds another sequence"
        return past

    def _score(self, step):
        end = step.start + step.count
        scores = []
        for at, token_id in enumerate(step.score_ids, end - len(step.score_ids) + 1):
            assert at == end or token_id == self._read(step, at + 1)[-1], "not the token behind"
            scores.append(score_of((*self._read(step, at), token_id), step.score_top))
        return Drawn(scores=tuple(scores))

    def _draw(self, step):
        slot = self._slots[step.slot]
        past = self._read(step, step.start + step.count)
        verified = len(past) - step.drafts
        won = [next_token(past[:verified], slot.sampling, self.vocabulary)]
        while verified < len(past) and past[verified] == won[-1]:
            verified += 1
            won.append(next_token(past[:verified], slot.sampling, self.vocabulary))
        slot.last = won[-1]
        logprobs = ()
        if slot.sampling.logprobs is not None:
            logprobs = tuple(
                TokenLogprobs(token_id=each, logprob=-each / 10, top=()) for each in won
            )
        return Drawn(token_ids=tuple(won), logprobs=logprobs)


class _Slot:
    def __init__(self, sampling):
        self.sampling = sampling
        self.last = None


class _Pending:
    def __init__(self, runner, slots, result):
        self._runner = runner
        self._result = result
        self.slots = slots

    def wait(self):
        if self._runner.gate is not None:
            assert self._runner.gate.acquire(timeout=30), "the test lets no step pass"
        self._runner.finish(self)
        return self._result


def step_gate(steps=0):
    """Lets so many steps end, and one more for each release."""
    return threading.Semaphore(steps)
