"""Chunks of prompts on a GPU: captured steps against the same steps launch by launch."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.inference.runner_options import RunnerOptions
from engine.inference.runner_start import plan_memory, start_runner
from engine.inference.sampler_state import SamplerState
from engine.inference.sampling_params import SamplingParams
from engine.inference.steps import StepPlan
from tests.unit.engine.runner_bench import GREEDY, Bench, text
from tests.unit.engine.test_paged_runner_gpu import load_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BUCKETS = (1, 2, 4, 6)
SIZES = (64, 128, 192)
MEASURED = SamplingParams(temperature=0.0, seed=0, logprobs=5)
# slot, first token, tokens, whether it draws: chunks of one step
STEPS = [
    [(0, 0, 5, True)],
    [(1, 0, 64, False), (2, 0, 30, True)],
    [(1, 64, 17, True), (3, 0, 100, False), (4, 0, 3, True)],
    [(3, 100, 60, False)],
    [(3, 160, 7, True)],
    [(5, 0, 192, True)],
]


@pytest.fixture(params=[False, True], ids=["waiting", "overlapping"])
def overlaps(request):
    """Whether kernels start while those before still run."""
    return request.param


def bench_of(decoder, *, kv_bits=8, **options):
    sizes = {"max_step_tokens": 192, "pages": 80, "buckets": BUCKETS, "chunk_buckets": SIZES}
    return Bench(decoder, kv_bits=kv_bits, **(sizes | options))


def serve(bench):
    """All chunks, after each a token of everybody whose prompt is over; all that was drawn."""
    for slot in range(6):
        bench.open(slot, MEASURED)
    ends, pending = {}, []
    for chunks in STEPS:
        steps = [
            bench.step(slot, start, text(192, slot)[start : start + count], draws=draws)
            for slot, start, count, draws in chunks
        ]
        pending.append(bench.runner.launch(StepPlan(steps=tuple(steps))))
        ends |= {slot: start + count for slot, start, count, draws in chunks if draws}
        steps = [bench.step(slot, end) for slot, end in ends.items()]
        pending.append(bench.runner.launch(StepPlan(steps=tuple(steps))))
        ends = {slot: end + 1 for slot, end in ends.items()}
    found = [step.wait().drawn for step in pending]
    for slot in range(6):
        bench.close(slot)
    return found


def stored(bench):
    """All that the pages of sequences hold."""
    kept = slice(0, bench.runner.pages)
    parts = [(each.codes, each.scale, each.zero_point) for each in bench.runner.kv_pages]
    return [part[kept] for layer in parts for part in layer if part.numel()]


@pytest.mark.parametrize("notation", ["w4a8kv8", "w4a8g32kv4", "w8a8", "w4a16kv8"])
def test_captured_chunks_leave_the_bits_of_the_same_chunks_launch_by_launch(
    tmp_path, notation, overlaps
):
    decoder = load_decoder(tmp_path, notation, launch_pdl=overlaps)
    kv_bits = int(notation.partition("kv")[2] or 16)
    captured = bench_of(decoder, kv_bits=kv_bits)
    launched = bench_of(decoder, kv_bits=kv_bits, use_graphs=False)

    found, expected = serve(captured), serve(launched)

    # tokens, and the likeliest with their log-probabilities
    assert found == expected
    assert all(map(torch.equal, stored(captured), stored(launched)))
    assert launched.runner.memory.graph_bytes == 0


def test_a_batch_that_is_filled_up_gives_nearly_the_logits_of_one_that_is_not(tmp_path, overlaps):
    """Products and attention may have other tiles for other numbers of tokens."""
    decoder = load_decoder(tmp_path, "w8a16", launch_pdl=overlaps)
    filled, plain = (bench_of(decoder, kv_bits=16, chunk_graphs=each) for each in (True, False))

    chunks = [[drawn for drawn in serve(bench)[::2] if drawn] for bench in (filled, plain)]

    for found, expected in zip(*chunks, strict=True):
        assert found.keys() == expected.keys()
        for slot, drawn in found.items():
            values, others = dict(drawn.logprobs[0].top), dict(expected[slot].logprobs[0].top)
            common = values.keys() & others.keys()
            assert common
            assert all(values[each] == pytest.approx(others[each], abs=0.15) for each in common)


def test_chunks_go_on_the_same_after_the_runner_was_made_anew(tmp_path):
    decoder = load_decoder(tmp_path)
    bench = bench_of(decoder)
    expected, settled = serve(bench), bench.runner.settled
    del bench
    again = bench_of(decoder, pages=settled.pages)

    assert again.runner.settled == settled
    assert serve(again) == expected
    # and once more, over what the first left
    again.free = sorted(again.free)
    assert serve(again) == expected


def test_a_captured_chunk_is_one_replay_behind_one_copy(tmp_path):
    bench = bench_of(load_decoder(tmp_path))
    bench.open(0)
    bench.run(bench.step(0, 0, text(70), draws=False))
    step = bench.step(0, 70, text(60))

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        bench.run(step)
        torch.cuda.synchronize()

    names = [event.name for event in recorded.events()]
    assert any("cudaGraphLaunch" in name for name in names)
    assert sum("HtoD" in name for name in names) == 1


def test_padding_writes_to_no_page(tmp_path):
    bench = bench_of(load_decoder(tmp_path))
    bench.open(0)
    before = [each.clone() for each in stored(bench)]

    bench.run(bench.step(0, 0, text(80)))

    own = set(bench.pages[0])
    assert len(own) == 5
    for old, new in zip(before, stored(bench), strict=True):
        changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) <= own


def test_scored_and_mixed_steps_agree_with_replays_between_them(tmp_path):
    decoder = load_decoder(tmp_path)
    drawn = []
    for use_graphs in (True, False):
        bench, prompt = bench_of(decoder, use_graphs=use_graphs), text(90)
        for slot in range(3):
            bench.open(slot, GREEDY)
        found = [bench.run(bench.step(0, 0, prompt))]
        chunk = bench.step(1, 0, prompt[:-1], draws=False)
        found.append(bench.run(replace(chunk, score_ids=prompt[1:], score_top=3)))
        found.append(bench.run(bench.step(0, 90), bench.step(2, 0, text(40, 1))))
        found.append(bench.run(bench.step(1, 89, prompt[-1:] + text(9, 2))))
        found.append(bench.run(*(bench.step(slot, at) for slot, at in ((0, 91), (1, 99), (2, 40)))))
        drawn.append(found)

    assert drawn[0] == drawn[1]


def test_chunk_graphs_hold_no_more_than_was_reserved_for_them(tmp_path):
    decoder = load_decoder(tmp_path)
    options = RunnerOptions(max_sequences=8, kv_bits=8, pages=256, max_step_tokens=2048)
    without = replace(options, chunk_graphs=False)
    reserved = plan_memory(decoder, options).graph_bytes
    sampler = SamplerState(8, decoder.vocabulary, decoder.device)

    runner = start_runner(decoder, sampler, options)

    assert plan_memory(decoder, without).graph_bytes < reserved
    assert 0 < runner.memory.graph_bytes <= reserved
