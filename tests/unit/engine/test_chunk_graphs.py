"""Steps of chunks alone: filled up to a captured size they give what they give as they are."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from engine.checkpoint.reader import load_checkpoint
from engine.inference.chunk_graphs import MOST_SEQUENCES, ChunkGraphs, chunk_sizes
from engine.inference.decoder import Decoder
from engine.inference.decoder.cpu import CpuDevice
from engine.inference.decoder.operands import PlainSource
from engine.inference.mixed_batch import NOWHERE, MixedBatch
from engine.inference.mixed_forward import MixedForward, add_parts
from engine.inference.runner_options import RunnerOptions
from engine.inference.step_buffers import make_arenas
from engine.inference.steps import StepPlan
from kernels.step_state import SequenceState
from tests.unit.engine.quantized_models import save_checkpoint
from tests.unit.engine.runner_bench import PAGE, Bench, text
from tests.unit.engine.small_decoder import SmallDecoder
from tests.unit.engine.test_paged_runner import Traffic

SIZES = (8, 32, 64)
CPU = torch.device("cpu")


class Careless(SmallDecoder):
    """Keeps its logits, and leaves NaN where tokens are no sequence's."""

    def __init__(self):
        super().__init__()
        self.logits = []

    def forward(self, batch, pages):
        self.logits.append(super().forward(batch, pages))
        return self.logits[-1]

    def _attend(self, q, pages, batch):
        mixed = super()._attend(q, pages, batch)
        if batch.cu_seqlens is not None:
            mixed[batch.decodes + int(batch.cu_seqlens[-1]) :] = torch.nan
        return mixed


def bench_of(sizes=SIZES, **options):
    return Bench(Careless(), **({"chunk_buckets": sizes} | options))


def last_sizes(bench):
    """Tokens and sequences of the last batch."""
    batch = bench.decoder.batches[-1]
    return len(batch.token_ids), len(batch.lengths)


# what is computed


@pytest.mark.parametrize(
    ("lengths", "size"), [([5], 8), ([8], 8), ([9], 32), ([3, 7, 2], 32), ([20, 13, 2, 2, 9], 64)]
)
def test_prompts_of_one_step_get_the_logits_that_they_get_unfilled(lengths, size):
    filled, plain = bench_of(), bench_of(())
    prompts = [text(length, seed) for seed, length in enumerate(lengths)]
    drawn = []
    for bench in (filled, plain):
        for slot in range(len(prompts)):
            bench.open(slot)
        steps = [bench.step(slot, 0, prompt) for slot, prompt in enumerate(prompts)]
        drawn.append(bench.run(*steps))

    assert last_sizes(filled) == (size, 6)
    assert last_sizes(plain) == (sum(lengths), len(lengths))
    assert drawn[0] == drawn[1]
    found, expected = filled.decoder.logits[-1], plain.decoder.logits[-1]
    torch.testing.assert_close(found[: len(prompts)], expected, rtol=0, atol=1e-5)
    for logits, prompt in zip(found, prompts, strict=False):
        truth = filled.decoder.plain(prompt)[-1]
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cuts", [[37], [16, 16, 5], [7, 30], [30, 7]])
def test_chunks_go_on_where_the_last_one_ended_and_decodes_follow(cuts):
    bench, prompt = bench_of(buckets=(4, 6)), text(37)
    bench.open(2)
    start = 0
    for count in cuts:
        last = start + count == len(prompt)
        drawn = bench.run(bench.step(2, start, prompt[start : start + count], draws=last))
        assert last_sizes(bench)[0] in SIZES
        assert bool(drawn) is last
        start += count

    tokens = drawn[2].token_ids
    for position in range(37, 50):
        tokens += bench.run(bench.step(2, position))[2].token_ids

    assert tokens == bench.decoder.greedy(prompt, 14)


def test_a_cached_prefix_is_read_and_not_computed_again():
    bench, prompt = bench_of(), text(40)
    bench.open(0)
    bench.run(bench.step(0, 0, prompt))
    bench.open(1)
    bench.pages[1] = bench.pages[0][:2]

    drawn = bench.run(bench.step(1, 32, prompt[32:]))

    assert last_sizes(bench) == (8, 6)
    assert drawn[1].token_ids == bench.decoder.greedy(prompt, 1)


def test_random_traffic_gives_the_same_answers_as_one_by_one():
    bench = bench_of(buckets=(1, 2, 4, 6))
    traffic = Traffic(bench, [text(5 + 3 * seed, seed) for seed in range(12)])

    answers = traffic.run()

    assert answers == {p: bench.decoder.greedy(p, n) for p, n in traffic.wanted.items()}


def test_tokens_that_fill_up_are_stored_nowhere():
    bench, prompt = bench_of(), text(21)
    bench.open(1)

    bench.run(bench.step(1, 0, prompt))

    own = {(bench.pages[1][at // PAGE], at % PAGE) for at in range(21)}
    for pages in bench.runner.kv_pages:
        written = (~pages.codes.isnan()).any(dim=(1, 2, 4)).nonzero()
        assert {tuple(each) for each in written.tolist()} == own


@pytest.mark.parametrize("notation", ["w4a8kv8", "w4a8g32", "w8a16"])
def test_what_padding_holds_reaches_no_logits_of_a_checkpoint(tmp_path, monkeypatch, notation):
    directory = save_checkpoint(tmp_path, notation)[1]
    decoder = Decoder.from_loaded(load_checkpoint(directory, prepares=False), 8)
    plain, (first, second) = CpuDevice.attend, (text(13, 1), text(9, 2))

    def attend(self, query, pages, batch, *others):
        values = plain(self, query, pages, batch, *others)
        # nothing but a source that is not read yet
        assert isinstance(values, PlainSource)
        if batch.cu_seqlens is not None:
            values._x[int(batch.cu_seqlens[-1]) :] = torch.nan  # noqa: SLF001  # as a GPU leaves it
        return values

    monkeypatch.setattr(CpuDevice, "attend", attend)
    forward, logits = decoder.forward, []
    decoder.forward = lambda *each: logits.append(forward(*each)) or logits[-1]
    kv_bits = int(notation.partition("kv")[2] or 16)
    for sizes in ((), SIZES):
        bench = Bench(decoder, kv_bits=kv_bits, chunk_buckets=sizes)
        for slot in range(2):
            bench.open(slot)
        bench.run(bench.step(0, 0, first[:6], draws=False))
        bench.run(bench.step(0, 6, first[6:]), bench.step(1, 0, second))

    expected, found = logits[1], logits[3]
    assert (len(expected), len(found)) == (2, 6)
    torch.testing.assert_close(found[:2], expected, rtol=0, atol=1e-5)


# what is not filled up


def test_more_sequences_or_tokens_than_captured_run_as_they_are():
    count = MOST_SEQUENCES + 1
    bench = bench_of((8, 32), max_sequences=count)
    for slot in range(count):
        bench.open(slot)
    prompts = [text(2, slot) for slot in range(count)]

    most = bench.run(*(bench.step(slot, 0, prompts[slot]) for slot in range(count - 1)))
    assert last_sizes(bench) == (32, MOST_SEQUENCES)
    more = bench.run(*(bench.step(slot, 0, prompts[slot]) for slot in range(count)))
    assert last_sizes(bench) == (2 * count, count)
    bench.run(bench.step(0, 2, text(33)))
    assert last_sizes(bench) == (33, 1)

    assert most == {slot: more[slot] for slot in range(count - 1)}


def test_decodes_drafts_and_scores_run_as_they_are():
    bench, prompt = bench_of(), text(9)
    for slot in range(2):
        bench.open(slot)
    bench.run(bench.step(0, 0, prompt))

    bench.run(bench.step(0, 9), bench.step(1, 0, text(5)))
    beside = last_sizes(bench)
    bench.run(bench.step(0, 10, (3, 4, 5), drafts=2))
    drafted = last_sizes(bench)
    bench.run(replace(bench.step(1, 5, text(6), draws=False), score_ids=text(6)))

    assert [beside, drafted, last_sizes(bench)] == [(6, 2), (3, 3), (6, 1)]


def test_models_whose_chunks_wait_for_the_host_are_not_filled_up(tmp_path):
    options = RunnerOptions(max_step_tokens=64, chunk_buckets=SIZES)

    def waits(family):
        directory = save_checkpoint(tmp_path / family, "w4a8", family)[1]
        decoder = Decoder.from_loaded(load_checkpoint(directory, prepares=False))
        return decoder.chunks_wait, chunk_sizes(decoder, options)

    assert waits("mixtral") == (True, ())
    assert waits("llama") == (False, SIZES)


# captures


class Recording:
    """Stands for graphs: counts replays, which compute nothing."""

    def __init__(self):
        self.replays = []

    @contextmanager
    def recorded(self):
        graph = type("Graph", (), {})()
        graph.replay = lambda: self.replays.append(graph)
        yield graph


def plan_of(bench, slots, count, start=0):
    return StepPlan(steps=tuple(bench.step(slot, start, text(count, slot)) for slot in slots))


def test_every_batch_of_a_size_lies_where_its_graph_reads_it():
    bench, decoder, pool = Bench(), Careless(), Recording()
    state = SequenceState.allocate(13, 4, scratch_page=5, device=CPU)
    pages = decoder.new_pages(6, kv_bits=16)
    graphs = ChunkGraphs(MixedForward(decoder, pages, state), (16, 32))
    arenas = make_arenas(2, 400, CPU)
    graphs.capture(arenas[0], pool)
    computed = len(decoder.batches)
    for slot in range(3):
        bench.open(slot)

    logits = []
    plans = [plan_of(bench, (0,), 11), plan_of(bench, (1, 2), 14, start=2), plan_of(bench, (2,), 3)]
    for turn, plan in enumerate(plans):
        arena = arenas[turn % 2]
        arena.begin()
        places = add_parts(graphs.fill(MixedBatch.of(plan, PAGE)), arena)
        # what follows is of any size
        arena.add([7] * turn)
        logits.append(graphs.forward(arena.send(), places))

    assert graphs.captured == (16, 32)
    assert len(decoder.batches) == computed == 4
    # the first is of 16 tokens, as is the third
    assert pool.replays[0] is pool.replays[2] is not pool.replays[1]
    assert logits[0] is logits[1]
    assert logits[0].shape == (MOST_SEQUENCES, decoder.vocabulary)
    assert all(pages.codes.isnan().all() for pages in pages)


def test_a_batch_is_filled_up_by_tokens_and_sequences_of_nobody():
    bench = Bench()
    bench.open(0)
    bench.open(3)
    steps = (bench.step(3, 2, (41, 42, 43)), bench.step(0, 0, (44, 45), draws=False))
    batch = MixedBatch.of(StepPlan(steps=steps), PAGE)

    filled = batch.filled(8, 4, 6)

    assert filled.token_ids.tolist() == [41, 42, 43, 44, 45, 0, 0, 0]
    assert filled.positions.tolist() == [2, 3, 4, 0, 1, 0, 0, 0]
    assert filled.kv_slots.tolist() == [*batch.kv_slots.tolist(), *[NOWHERE] * 3]
    assert (filled.slots.tolist(), filled.lengths.tolist()) == ([3, 0, 6, 6], [5, 2, 0, 0])
    assert filled.cu_seqlens.tolist() == [0, 3, 5, 5, 5]
    assert filled.logit_rows.tolist() == [2, 0, 0, 0]
    assert filled.drawing == batch.drawing
    assert all(getattr(filled, name).dtype.name == "int32" for name in ("token_ids", "cu_seqlens"))
