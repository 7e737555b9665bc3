"""How much memory a runner plans for, and for how many sequences at a time."""

import pytest

from engine.errors import EngineError
from engine.inference.memory_plan import (
    MemoryPlan,
    OutOfMemory,
    chunk_buckets,
    count_pages,
    decode_buckets,
)
from engine.inference.runner_options import RunnerOptions
from engine.inference.runner_start import plan_memory
from kernels.tables import BUCKETS
from tests.unit.engine.small_decoder import SmallDecoder

PAGE_BYTES = 16 * 256  # sixteen tokens of two layers, keys and values, two heads of eight floats


def test_a_budget_holds_its_pages_and_the_scratch_page():
    assert count_pages(1000 * 101, 1000, 16) == 100
    assert count_pages(1000 * 101 - 1, 1000, 16) == 99


@pytest.mark.parametrize("budget_bytes", [16_999, 0, -5])
def test_a_budget_for_less_than_a_conversation_is_refused(budget_bytes):
    with pytest.raises(OutOfMemory, match="fewer than 256; raise memory_fraction"):
        count_pages(budget_bytes, 1000, 16)
    assert count_pages(17_000, 1000, 16) == 16
    assert issubclass(OutOfMemory, EngineError)


def test_the_parts_of_a_plan_are_its_total():
    plan = MemoryPlan(
        weight_bytes=1000, workspace_bytes=200, graph_bytes=30, page_bytes=10, pages=4
    )

    assert plan.kv_bytes == 50
    assert plan.total_bytes == 1280


@pytest.mark.parametrize(
    ("options", "pages"),
    [({}, 1024), ({"pages": 70}, 70), ({"kv_bytes": 51 * PAGE_BYTES}, 50),
     ({"kv_bytes": 51 * PAGE_BYTES, "pages": 7}, 7)],
)  # fmt: skip
def test_a_cpu_has_as_many_pages_as_it_is_told(options, pages):
    plan = plan_memory(SmallDecoder(), RunnerOptions(**options))

    assert (plan.pages, plan.page_bytes) == (pages, PAGE_BYTES)
    assert (plan.weight_bytes, plan.workspace_bytes, plan.graph_bytes) == (4096, 0, 0)


@pytest.mark.parametrize(
    ("most", "buckets"),
    [
        (1, (1,)),
        (5, (1, 2, 4, 5)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
        (64, (1, 2, 4, 8, 16, 24, 32, 48, 64)),
        (200, (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 200)),
    ],
)
def test_batch_sizes_are_dense_where_a_row_costs_most(most, buckets):
    assert decode_buckets(most) == buckets


@pytest.mark.parametrize(
    ("most", "buckets"),
    [
        (40, (40,)),
        (64, (64,)),
        (300, (64, 128, 192, 256, 300)),
        (
            2048,
            (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048),
        ),
    ],
)
def test_chunks_are_filled_up_by_few_tokens(most, buckets):
    assert chunk_buckets(most) == buckets


def test_a_chunk_that_is_filled_up_keeps_its_place_in_tables():
    sizes = chunk_buckets(5000)

    for tokens in range(64, 5001):
        filled = min(size for size in sizes if size >= tokens)
        places = [next((b for b in BUCKETS if b >= m), BUCKETS[-1]) for m in (tokens, filled)]
        assert places[0] == places[1]
        assert filled <= max(tokens + 63, 1.25 * tokens)


def test_chunks_are_filled_up_on_a_gpu_only_unless_told():
    options = RunnerOptions(max_step_tokens=128)
    assert options.chunk_buckets_on("cuda") == (64, 128)
    assert options.chunk_buckets_on("cpu") == ()
    told = RunnerOptions(chunk_buckets=(32, 100))
    assert told.chunk_buckets_on("cuda") == told.chunk_buckets_on("cpu") == (32, 100)
    assert RunnerOptions(chunk_buckets=(32,), chunk_graphs=False).chunk_buckets_on("cuda") == ()


def test_batches_are_filled_up_on_a_gpu_only_unless_told():
    assert RunnerOptions(max_sequences=4).buckets_on("cuda") == (1, 2, 4)
    assert RunnerOptions(max_sequences=4).buckets_on("cpu") == ()
    assert RunnerOptions(max_sequences=4, buckets=(4,)).buckets_on("cpu") == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_sequences": 0}, "max_sequences = 0 is not possible"),
        ({"max_step_tokens": 0}, "max_step_tokens = 0 is not possible"),
        ({"memory_fraction": 0.0}, "memory_fraction = 0.0 is not possible"),
        ({"memory_fraction": float("nan")}, "memory_fraction = nan is not possible"),
        ({"chunk_buckets": (8, 4)}, "rising numbers up to max_step_tokens = 2048"),
        ({"chunk_buckets": (64, 4096)}, "rising numbers up to max_step_tokens = 2048"),
        ({"chunk_buckets": (0, 64)}, "rising numbers up to max_step_tokens = 2048"),
        ({"buckets": (4, 2)}, "rising sizes that end with max_sequences = 64"),
        ({"buckets": (4, 8)}, "rising sizes that end with max_sequences = 64"),
    ],
)
def test_impossible_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RunnerOptions(**change)
