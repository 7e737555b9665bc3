import pytest
import torch

from kernels.attention import PagedContext, Scoring, attention_reference
from kernels.paged_prefill import paged_prefill
from tests.kernels.kv_cases import filled_pages, fresh_module


@pytest.fixture
def kernel(monkeypatch, device):
    """`kernels.paged_prefill` whose Triton kernel runs here."""
    return fresh_module("paged_prefill", interpreted=device == "cpu", monkeypatch=monkeypatch)


def case(device, *, bits, counts, lengths, group=2, kv_heads=1, head_dim=64, dtype=torch.float16):
    """Chunks of `counts` tokens at the end of sequences of `lengths`."""
    pages, table, lengths = filled_pages(
        lengths, kv_heads, head_dim, bits=bits, dtype=dtype, device=device
    )
    starts = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    query = torch.randn(sum(counts), group * kv_heads, head_dim).to(device, dtype)
    return query, pages, PagedContext(block_table=table, lengths=lengths), starts


def check(kernel, query, pages, context, starts, scoring, **blocks):
    values = {"block_m": 16, "block_t": 16, "num_warps": 1, "num_stages": 2} | blocks
    out = torch.full_like(query, float("nan"))
    kernel.launch_paged_prefill(
        query, pages, context, scoring, starts, out=out, config=kernel.LaunchConfig(**values)
    )
    expected = attention_reference(query, pages, context, scoring, starts)
    # as for decode: one rounding of the weights, one of the result
    step = torch.finfo(query.dtype).eps
    size = expected.abs().amax(-1, keepdim=True) + step
    assert bool(((out - expected).abs() <= 2 * step * size).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_prompts_of_several_sequences_attend_causally(kernel, device, bits, head_dim, dtype):
    counts = (21, 3, 9)
    args = case(device, bits=bits, counts=counts, lengths=counts, head_dim=head_dim, dtype=dtype)

    check(kernel, *args, Scoring(softmax_scale=head_dim**-0.5))


@pytest.mark.parametrize("bits", [4, 16])
def test_a_chunk_attends_to_earlier_chunks(kernel, device, bits):
    args = case(device, bits=bits, counts=(7, 0, 20), lengths=(40, 12, 33), kv_heads=2)

    check(kernel, *args, Scoring(softmax_scale=0.125), block_t=32)


@pytest.mark.parametrize("bits", [4, 16])
def test_sequences_and_tokens_that_fill_a_batch_up_change_no_bit(kernel, device, bits):
    query, pages, context, starts = case(device, bits=bits, counts=(7, 20), lengths=(40, 33))
    scoring = Scoring(softmax_scale=0.125)
    config = kernel.LaunchConfig(block_m=16, block_t=16, num_warps=1, num_stages=2)
    alone = kernel.launch_paged_prefill(query, pages, context, scoring, starts, config=config)
    # tokens behind the last sequence, and sequences of none whose pages are nobody's
    more = torch.cat([query, torch.full_like(query[:21], float("nan"))])
    table, lengths = context.block_table, context.lengths
    filled = PagedContext(
        block_table=torch.cat([table, torch.full_like(table, len(pages.codes) - 1)]),
        lengths=torch.cat([lengths, torch.zeros_like(lengths)]),
    )
    starts = torch.cat([starts, starts[-1:], starts[-1:]])
    out = torch.full_like(more, 7.0)

    kernel.launch_paged_prefill(more, pages, filled, scoring, starts, out=out, config=config)

    assert torch.equal(out[:27], alone)
    assert bool((out[27:] == 7.0).all())


@pytest.mark.parametrize(("head_dim", "bits"), [(80, 2), (80, 16), (96, 4), (256, 2)])
def test_heads_of_any_size(kernel, device, bits, head_dim):
    args = case(device, bits=bits, counts=(10,), lengths=(18,), head_dim=head_dim)

    check(kernel, *args, Scoring(softmax_scale=head_dim**-0.5))


@pytest.mark.parametrize("group", [1, 7, 20])
def test_groups_of_any_size(kernel, device, group):
    args = case(device, bits=4, counts=(9, 2), lengths=(9, 20), group=group)

    check(kernel, *args, Scoring(softmax_scale=0.2))


@pytest.mark.parametrize(("window", "bits"), [(1, 4), (16, 16), (23, 4)])
def test_a_window_hides_what_lies_behind(kernel, device, bits, window):
    args = case(device, bits=bits, counts=(30, 5), lengths=(50, 40))

    check(kernel, *args, Scoring(softmax_scale=0.1, window=window))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_soft_cap_bounds_the_scores(kernel, device, bits):
    args = case(device, bits=bits, counts=(12,), lengths=(30,))

    check(kernel, *args, Scoring(softmax_scale=3.0, soft_cap=5.0))


def test_small_chunks_take_small_tiles(kernel):
    small, large = kernel.select_config(4, 4, 128), kernel.select_config(2048, 4, 128)

    assert small.block_m < large.block_m
    assert kernel.select_config(2048, 4, 128, {(4, 128): small}) == small


def test_starts_that_do_not_fit_the_sequences_are_refused():
    query, pages, context, starts = case("cpu", bits=4, counts=(3, 2), lengths=(3, 2))

    with pytest.raises(ValueError, match="cu_seqlens must be"):
        paged_prefill(query, pages, context, Scoring(softmax_scale=1.0), starts[:2])


def test_a_cpu_gets_the_reference():
    query, pages, context, starts = case("cpu", bits=4, counts=(3, 2), lengths=(3, 7))
    scoring = Scoring(softmax_scale=0.125)

    out = paged_prefill(query, pages, context, scoring, starts)

    expected = attention_reference(query, pages, context, scoring, starts).half()
    assert torch.equal(out, expected)
