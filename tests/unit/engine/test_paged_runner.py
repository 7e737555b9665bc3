"""The runner: what plans compute equals a plain forward pass, whatever they are cut into."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.inference.draw_kind import DrawKind
from engine.inference.open_slots import OpenSlots
from engine.inference.paged_runner import PagedRunner
from engine.inference.runner_start import plan_memory, start_runner, warm_up
from engine.inference.sampling_params import SamplingParams
from engine.inference.steps import Runner, SequenceStep, StepPlan
from tests.unit.engine.runner_bench import GREEDY, MAX_SEQUENCES, PAGE, Bench, text
from tests.unit.engine.small_decoder import VOCABULARY

# one sequence


@pytest.mark.parametrize("cuts", [[37], [1, 36], [16, 16, 5], [20, 17], [36, 1]])
@pytest.mark.parametrize("buckets", [None, (4, 6)])
def test_a_prompt_in_chunks_and_its_decode_give_the_tokens_of_a_plain_forward(cuts, buckets):
    bench, prompt = Bench(buckets=buckets), text(37)
    bench.open(2)
    start = 0
    for length in cuts:
        last = start + length == len(prompt)
        chunk = prompt[start : start + length]
        drawn = bench.run(bench.step(2, start, chunk, draws=last))
        assert bool(drawn) is last
        start += length

    tokens = list(drawn[2].token_ids)
    for position in range(37, 37 + 20):
        tokens += bench.run(bench.step(2, position))[2].token_ids

    assert tuple(tokens) == bench.decoder.greedy(prompt, 21)


def test_a_token_may_be_given_instead_of_drawn():
    bench, prompt = Bench(), text(9)
    bench.open(0)
    bench.run(bench.step(0, 0, prompt))

    drawn = bench.run(bench.step(0, 9, (7,)))[0].token_ids

    assert drawn == bench.decoder.greedy((*prompt, 7), 1)
    assert bench.run(bench.step(0, 10))[0].token_ids == bench.decoder.greedy((*prompt, 7), 2)[1:]


# several sequences


def test_decodes_and_chunks_of_others_share_a_step():
    bench = Bench()
    for slot in range(3):
        bench.open(slot)
    first, second, third = text(20, 1), text(30, 2), text(5, 3)
    bench.run(bench.step(0, 0, first))
    bench.run(bench.step(0, 20), bench.step(1, 0, second[:11], draws=False))

    drawn = bench.run(bench.step(0, 21), bench.step(1, 11, second[11:]), bench.step(2, 0, third))

    assert drawn[0].token_ids == bench.decoder.greedy(first, 3)[2:]
    assert drawn[1].token_ids == bench.decoder.greedy(second, 1)
    assert drawn[2].token_ids == bench.decoder.greedy(third, 1)
    drawn = bench.run(bench.step(2, 5), bench.step(0, 22), bench.step(1, 30))
    assert drawn[1].token_ids == bench.decoder.greedy(second, 2)[1:]
    assert drawn[2].token_ids == bench.decoder.greedy(third, 2)[1:]


class Traffic:
    """Sequences that come and go at random, in slots and pages that others left."""

    def __init__(self, bench, prompts):
        self.bench, self.chance = bench, np.random.default_rng(11)
        self.waiting = list(prompts)
        self.wanted = {prompt: int(self.chance.integers(1, 13)) for prompt in prompts}
        self.running, self.done, self.answers = {}, {}, {}

    def run(self):
        while self.waiting or self.running:
            if self.waiting and len(self.running) < MAX_SEQUENCES and self.chance.random() < 0.7:
                self.admit()
            steps = self.plan()
            if steps:
                self.take(steps, self.bench.run(*steps))
        return self.answers

    def admit(self):
        slot = int(self.chance.choice([s for s in range(MAX_SEQUENCES) if s not in self.running]))
        self.bench.open(slot)
        prompt = self.running[slot] = self.waiting.pop()
        self.done[slot], self.answers[prompt] = 0, ()

    def plan(self):
        steps = []
        for slot in self.chance.permutation(list(self.running)).tolist():
            prompt, done = self.running[slot], self.done[slot]
            if done >= len(prompt):
                steps.append(self.bench.step(slot, done))
            elif self.chance.random() < 0.7:
                end = min(len(prompt), done + int(self.chance.integers(1, 20)))
                chunk = prompt[done:end]
                steps.append(self.bench.step(slot, done, chunk, draws=end == len(prompt)))
        return sorted(steps, key=lambda step: step.count > 1)[:4]

    def take(self, steps, drawn):
        for step in steps:
            prompt = self.running[step.slot]
            self.done[step.slot] += step.count
            self.answers[prompt] += drawn[step.slot].token_ids if step.draws else ()
            if len(self.answers[prompt]) == self.wanted[prompt]:
                self.bench.close(step.slot)
                del self.running[step.slot]


@pytest.mark.parametrize("buckets", [None, (1, 2, 4, 6)])
def test_random_traffic_gives_the_same_answers_as_one_by_one(buckets):
    bench = Bench(buckets=buckets)
    traffic = Traffic(bench, [text(5 + 3 * seed, seed) for seed in range(12)])

    answers = traffic.run()

    assert answers == {p: bench.decoder.greedy(p, n) for p, n in traffic.wanted.items()}
    assert len(bench.free) == bench.runner.pages


def test_rows_that_fill_a_batch_up_touch_the_scratch_page_alone():
    bench, prompt = Bench(buckets=(6,)), text(8)
    bench.open(1)
    bench.run(bench.step(1, 0, prompt))
    before = [pages.codes.clone() for pages in bench.runner.kv_pages]

    bench.run(bench.step(1, 8))

    batch = bench.decoder.batches[-1]
    assert batch.decodes == 6
    assert batch.kv_slots[1:].tolist() == [bench.runner.pages * PAGE] * 5
    for old, new in zip(before, bench.runner.kv_pages, strict=True):
        changed = (old.nan_to_num(7) != new.codes.nan_to_num(7)).any(dim=(1, 2, 4)).nonzero()
        page = bench.pages[1][0]
        assert {tuple(each) for each in changed.tolist()} == {(page, 8), (bench.runner.pages, 0)}


# a slot that changes hands


def test_a_slot_is_used_again_with_other_pages():
    bench = Bench()
    for seed in range(3):
        bench.open(4)
        prompt = text(20, seed)
        tokens = bench.run(bench.step(4, 0, prompt))[4].token_ids
        tokens += bench.run(bench.step(4, 20))[4].token_ids
        assert tokens == bench.decoder.greedy(prompt, 2)
        bench.close(4)


def test_pages_that_another_sequence_filled_are_read():
    """A prefix that is cached: its pages are named and its tokens not computed again."""
    bench, prompt = Bench(), text(40)
    bench.open(0)
    bench.run(bench.step(0, 0, prompt))
    bench.open(1)
    bench.pages[1] = bench.pages[0][:2]

    drawn = bench.run(bench.step(1, 32, prompt[32:]))

    assert drawn[1].token_ids == bench.decoder.greedy(prompt, 1)


CHANCE = SamplingParams(temperature=1.5, seed=5, presence_penalty=1.0)


def generate(bench, slot, params, prompt, drawn, count):
    """Draw so many more tokens for a sequence whose earlier ones were drawn elsewhere."""
    bench.open(slot, params, prompt, drawn)
    tokens = bench.run(bench.step(slot, 0, (*prompt, *drawn)))[slot].token_ids
    while len(tokens) < count:
        at = len(prompt) + len(drawn) + len(tokens) - 1
        tokens += bench.run(bench.step(slot, at))[slot].token_ids
    bench.close(slot)
    return drawn + tokens


def test_a_preempted_sequence_goes_on_where_it_was():
    bench, prompt = Bench(), text(12)
    whole = generate(bench, 1, CHANCE, prompt, (), 9)

    first = generate(bench, 0, CHANCE, prompt, (), 4)
    rest = generate(bench, 3, CHANCE, prompt, first, 5)

    assert rest == whole
    assert whole != bench.decoder.greedy(prompt, 9)


def test_pages_that_change_are_told_the_device():
    bench, prompt = Bench(), text(20)
    bench.open(0)
    bench.run(bench.step(0, 0, prompt))
    moved = [bench.free.pop(), bench.free.pop()]
    for pages in bench.runner.kv_pages:
        for old, new in zip(bench.pages[0], moved, strict=True):
            pages.codes[new] = pages.codes[old]
            pages.codes[old] = torch.nan
    bench.pages[0] = moved

    assert bench.run(bench.step(0, 20))[0].token_ids == bench.decoder.greedy(prompt, 2)[1:]


# what is sent


def test_a_sequence_that_goes_on_sends_nothing_but_a_page_now_and_then(monkeypatch):
    bench = Bench()
    bench.open(0)
    bench.run(bench.step(0, 0, text(14)))
    bench.run(bench.step(0, 14))
    sent = []
    monkeypatch.setattr(
        "engine.inference.step_buffers.write_words",
        lambda state, offsets, values: (
            sent.append(offsets.tolist()) or state.words.index_put_((offsets.long(),), values)
        ),
    )

    for position in range(15, 18):
        bench.run(bench.step(0, position))

    # position 16 is the first of the second page
    table = 3 * (MAX_SEQUENCES + 1)
    assert sent == [[table + 1]]


# launching ahead


@pytest.mark.parametrize("buckets", [None, (1, 2, 4, 6)])
def test_a_step_is_launched_before_the_one_before_it_was_waited_for(buckets):
    bench, prompt = Bench(buckets=buckets), text(10)
    bench.open(5)
    pending = [bench.runner.launch(StepPlan(steps=(bench.step(5, 0, prompt),)))]
    plans = (StepPlan(steps=(bench.step(5, position),)) for position in range(10, 20))
    pending += [bench.runner.launch(plan) for plan in plans]

    tokens = [pending_step.wait().drawn[5].token_ids[0] for pending_step in pending]

    assert tuple(tokens) == bench.decoder.greedy(prompt, 11)
    assert pending[3].wait() is pending[3].wait()


# drafts


def drafted(bench, prompt, drafts):
    bench.open(0)
    first = bench.run(bench.step(0, 0, prompt))[0].token_ids[0]
    return bench.run(bench.step(0, len(prompt), (first, *drafts), drafts=len(drafts)))[0].token_ids


@pytest.mark.parametrize("right", range(5))
def test_drafts_are_taken_as_far_as_they_are_right(right):
    bench, prompt = Bench(), text(15)
    truth = bench.decoder.greedy(prompt, 9)
    guesses = list(truth[1:5])
    if right < 4:
        guesses[right] = (guesses[right] + 1) % VOCABULARY

    won = drafted(bench, prompt, guesses)

    assert won == truth[1 : 2 + right]
    # rejected guesses leave no trace, and the last token is on the device
    at = len(prompt) + 1 + right
    tokens = [bench.run(bench.step(0, at + i))[0].token_ids[0] for i in range(3)]
    assert tuple(tokens) == truth[2 + right : 5 + right]


def test_sequences_with_unlike_drafts_share_a_step_with_decodes():
    bench, prompts = Bench(), [text(9, seed) for seed in range(3)]
    truths = [bench.decoder.greedy(prompt, 8) for prompt in prompts]
    for slot, prompt in enumerate(prompts):
        bench.open(slot)
        bench.run(bench.step(slot, 0, prompt))
    wrong = (truths[2][2] + 1) % VOCABULARY

    drawn = bench.run(
        bench.step(0, 9),
        bench.step(1, 9, truths[1][:4], drafts=3),
        bench.step(2, 9, (*truths[2][:2], wrong), drafts=2),
    )

    assert [drawn[slot].token_ids for slot in range(3)] == [
        truths[0][1:2], truths[1][1:5], truths[2][1:3]
    ]  # fmt: skip


# what is asked of draws


KINDS = {
    "greedy": GREEDY,
    "warm": SamplingParams(temperature=1.2, seed=3),
    "limited": SamplingParams(temperature=1.2, seed=4, top_k=9, top_p=0.8, min_p=0.01),
    "penalized": SamplingParams(temperature=0.0, seed=0, repetition_penalty=1.5),
    "biased": SamplingParams(temperature=0.0, seed=0, logit_bias=((7, 100.0),)),
    "measured": SamplingParams(temperature=0.0, seed=0, logprobs=3),
}


@pytest.mark.parametrize("buckets", [None, (1, 2, 4, 6)])
def test_what_others_ask_of_a_batch_changes_nothing(buckets):
    bench = Bench(buckets=buckets)
    prompts = {name: text(9, seed) for seed, name in enumerate(KINDS)}
    alone = {name: generate(bench, 2, KINDS[name], prompts[name], (), 6) for name in KINDS}

    together = dict.fromkeys(KINDS, ())
    for slot, name in enumerate(KINDS):
        bench.open(slot, KINDS[name], prompts[name])
        together[name] += bench.run(bench.step(slot, 0, prompts[name]))[slot].token_ids
    for position in range(9, 14):
        drawn = bench.run(*(bench.step(slot, position) for slot in range(len(KINDS))))
        for slot, name in enumerate(KINDS):
            together[name] += drawn[slot].token_ids

    assert together == alone
    assert set(alone["biased"]) == {7}
    assert alone["penalized"] != bench.decoder.greedy(prompts["penalized"], 6)
    assert alone["greedy"] == bench.decoder.greedy(prompts["greedy"], 6)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["greedy", "warm"], DrawKind.PLAIN),
        (["greedy", "limited"], DrawKind.LIMITED),
        (["measured", "limited"], DrawKind.FULL),
        (["biased"], DrawKind.FULL),
        ([], DrawKind.PLAIN),
    ],
)
def test_a_batch_draws_as_simply_as_its_sequences_allow(names, kind):
    slots = OpenSlots()
    slots.add(9, KINDS["penalized"])
    for slot, name in enumerate(names):
        slots.add(slot, KINDS[name])

    assert slots.kind_of(Bench.bare_step(slot) for slot in range(len(names))) is kind


def test_log_probabilities_come_with_the_tokens_of_those_that_ask():
    bench, prompt = Bench(), text(6)
    bench.open(0)
    bench.open(1, KINDS["measured"])
    bench.open(2, SamplingParams(temperature=0.0, seed=0, logprobs=0))
    steps = [bench.step(slot, 0, prompt) for slot in range(3)]

    drawn = bench.run(*steps)
    later = bench.run(*(bench.step(slot, 6) for slot in (2, 1)))

    truth = bench.decoder.plain(prompt)[-1].log_softmax(-1)
    assert drawn[0].logprobs == ()
    [measured], [bare] = drawn[1].logprobs, drawn[2].logprobs
    assert (measured.token_id, bare.top) == (int(truth.argmax()), ())
    assert measured.logprob == pytest.approx(float(truth.max()), abs=1e-4)
    values, ids = truth.topk(3)
    assert [token for token, _ in measured.top] == ids.tolist()
    assert [value for _, value in measured.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert later[1].logprobs[0].token_id == later[1].token_ids[0] == later[2].token_ids[0]


@pytest.mark.parametrize("cuts", [[1, 35], [16, 20], [36]])
def test_tokens_of_prompts_are_scored_beside_what_others_draw(cuts):
    bench, prompt, other = Bench(), text(37), text(11, 1)
    answer = bench.decoder.greedy(other, 1 + 3 * len(cuts))
    for slot in range(3):
        bench.open(slot)
    assert bench.run(bench.step(0, 0, other))[0].token_ids == answer[:1]
    found, start = [], 0
    for turn, length in enumerate(cuts):
        at = 3 * turn
        scored = replace(
            bench.step(1, start, prompt[start : start + length], draws=False),
            score_ids=prompt[start + 1 : start + length + 1],
            score_top=turn,
        )
        # of the second prompt only what stands behind its last two tokens
        late = replace(bench.step(2, 0, other, draws=False), score_ids=(7, 8), score_top=2)
        guessing = bench.step(0, 11 + at, (answer[at], *answer[at + 1 : at + 3]), drafts=2)
        drawn = bench.run(guessing, scored, late)
        assert drawn[0].token_ids == answer[at + 1 : at + 4]
        assert (drawn[1].token_ids, drawn[1].logprobs) == ((), ())
        assert {len(each.top) for each in drawn[1].scores} == {turn}
        check_scores(drawn[2].scores, bench.decoder.plain(other)[-2:], (7, 8))
        found += drawn[1].scores
        start += length

    check_scores(found, bench.decoder.plain(prompt), prompt[1:])


def check_scores(scores, logits, token_ids):
    assert [each.token_id for each in scores] == list(token_ids)
    for row, each in zip(logits.log_softmax(-1), scores, strict=False):
        values, ids = row.topk(len(each.top))
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
        assert [token for token, _ in each.top] == ids.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_row_that_cannot_be_drawn_is_reported_and_goes_on_within_the_vocabulary():
    bench = Bench()
    bench.open(0)
    bench.decoder.head[:] = torch.nan

    assert bench.run(bench.step(0, 0, text(4)))[0].token_ids == (-1,)
    assert bench.run(bench.step(0, 4))[0].token_ids == (-1,)
    assert bench.decoder.batches[-1].token_ids.tolist() == [0]


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": 1}, "slot = 1: open it first"),
        ({"page_ids": ()}, "0 pages for 5 tokens"),
        ({"token_ids": (1, VOCABULARY)}, f"must be below {VOCABULARY}"),
        ({"token_ids": (-1, 3)}, f"must be below {VOCABULARY}"),
        ({"start": 126}, "position 131 of 128"),
        ({"token_ids": (0,) * 71}, "plan at most 70"),
        ({"score_ids": (1,)}, "1 scores behind 5 given tokens"),
        ({"score_ids": (1,) * 6, "draws": False}, "6 scores behind 5 given tokens"),
        ({"score_ids": (VOCABULARY,), "draws": False}, f"must be below {VOCABULARY}"),
        ({"score_ids": (1,) * 129, "draws": False}, "score at most 128"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_and_leaves_the_runner_as_it_was(change, message):
    bench, prompt = Bench(), text(5)
    bench.open(0)
    good = {"slot": 0, "start": 0, "token_ids": prompt, "page_ids": (3,), "draws": True}

    with pytest.raises(ValueError, match=message):
        bench.runner.launch(StepPlan(steps=(SequenceStep(**(good | change)),)))

    drawn = bench.run(SequenceStep(**good))
    assert drawn[0].token_ids == bench.decoder.greedy(prompt, 1)


def test_drafts_of_sequences_that_leave_things_to_chance_are_refused():
    bench = Bench()
    bench.open(0, SamplingParams(temperature=1.0, seed=0))

    with pytest.raises(ValueError, match="drafts are for greedy sequences"):
        bench.run(bench.step(0, 0, (1, 2), drafts=1))


def test_slots_are_opened_once_and_within_their_number():
    bench = Bench()
    bench.open(0)

    for slot in (0, MAX_SEQUENCES, -1):
        with pytest.raises(ValueError, match="use a free one below 6"):
            bench.runner.open(slot, GREEDY, ())


def test_the_context_is_what_model_pages_and_options_have():
    assert Bench().runner.context_length == 128
    assert Bench(pages=3).runner.context_length == 48
    assert Bench(context_length=100).runner.context_length == 100


def test_memory_is_counted():
    bench = Bench()
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dims, bytes

    sampler_bytes = bench.sampler.memory_bytes
    plan = plan_memory(bench.decoder, bench.options)
    assert bench.runner.memory == replace(plan, sampler_bytes=sampler_bytes)
    assert bench.runner.memory_bytes == 4096 + sampler_bytes + 41 * PAGE * per_token


def test_the_memory_of_a_runner_is_free_as_soon_as_it_is_dropped():
    bench = Bench(buckets=(6,))
    generate(bench, 0, CHANCE, text(9), (), 4)
    bench.open(1)
    bench.run(bench.step(1, 0, text(5)))
    pages = weakref.ref(bench.runner.kv_pages[0].codes)
    bench.decoder.batches.clear()

    gc.disable()
    try:
        del bench
        assert pages() is None
    finally:
        gc.enable()


def test_a_runner_is_made_again_in_the_same_shape():
    first = Bench(pages=None, kv_bytes=51 * PAGE * 256)

    again = start_runner(first.decoder, first.sampler, first.runner.settled)

    assert again.memory == first.runner.memory
    assert again.pages == 50


def test_warming_up_leaves_no_trace():
    bench, prompt = Bench(), text(9)

    warm_up(bench.runner, 64)

    batches = bench.decoder.batches
    assert {batch.positions.shape[0] for batch in batches} == {15, 16, 17, 31, 32, 64}
    assert any(batch.decodes and batch.cu_seqlens is not None for batch in batches)
    assert generate(bench, 0, GREEDY, prompt, (), 3) == bench.decoder.greedy(prompt, 3)


def test_a_runner_is_what_a_scheduler_expects():
    wanted = set(Runner.__annotations__) | {"open", "close", "launch"}
    runner = Bench().runner
    assert isinstance(runner, PagedRunner)
    assert all(hasattr(runner, name) for name in wanted)
