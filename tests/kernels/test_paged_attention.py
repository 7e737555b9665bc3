import pytest
import torch

from kernels.attention import PagedContext, Scoring, attention_reference
from kernels.kv_pages import KvPages
from kernels.paged_attention import paged_attention
from tests.kernels.kv_cases import filled_pages, fresh_module


@pytest.fixture
def kernel(monkeypatch, device):
    """`kernels.paged_attention` whose Triton kernels run here."""
    return fresh_module("paged_attention", interpreted=device == "cpu", monkeypatch=monkeypatch)


def config_of(kernel, splits=1, **changed):
    values = {"splits": splits, "min_chunk": 16, "block_t": 16, "num_warps": 1, "num_stages": 2}
    return kernel.LaunchConfig(**(values | changed))


def case(device, *, bits, lengths=(37, 0, 5), group=2, kv_heads=1, head_dim=64, dtype=None):
    dtype = dtype or torch.float16
    pages, table, lengths = filled_pages(
        lengths, kv_heads, head_dim, bits=bits, dtype=dtype, device=device
    )
    query = torch.randn(len(lengths), group * kv_heads, head_dim).to(device, dtype)
    return query, pages, PagedContext(block_table=table, lengths=lengths)


def attend(kernel, query, pages, context, scoring, config):
    out = torch.full_like(query, float("nan"))
    kernel.launch_paged_attention(query, pages, context, scoring, out=out, config=config)
    return out


def assert_near(actual, query, pages, context, scoring):
    expected = attention_reference(query, pages, context, scoring)
    # weights are rounded to the type of a product, and the result to that of the queries, which the
    # interpreter cuts off at bfloat16
    step = torch.finfo(query.dtype).eps
    size = expected.abs().amax(-1, keepdim=True) + step
    assert bool(((actual - expected).abs() <= 2 * step * size).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "splits"), [(64, torch.float16, 2), (128, torch.bfloat16, 1)]
)
def test_decode_attention_is_that_of_float64(kernel, device, bits, splits, head_dim, dtype):
    query, pages, context = case(device, bits=bits, head_dim=head_dim, dtype=dtype)
    scoring = Scoring(softmax_scale=head_dim**-0.5)

    out = attend(kernel, query, pages, context, scoring, config_of(kernel, splits))

    assert_near(out, query, pages, context, scoring)


@pytest.mark.parametrize(("head_dim", "bits"), [(80, 2), (80, 16), (96, 4), (256, 2), (256, 4)])
def test_heads_of_any_size(kernel, device, bits, head_dim):
    query, pages, context = case(device, bits=bits, head_dim=head_dim, kv_heads=2, lengths=(20,))
    scoring = Scoring(softmax_scale=head_dim**-0.5)

    out = attend(kernel, query, pages, context, scoring, config_of(kernel, 2))

    assert_near(out, query, pages, context, scoring)


@pytest.mark.parametrize("group", [1, 7, 71])
def test_groups_of_any_size(kernel, device, group):
    query, pages, context = case(device, bits=4, group=group, lengths=(20,))
    scoring = Scoring(softmax_scale=0.2)

    out = attend(kernel, query, pages, context, scoring, config_of(kernel))

    assert_near(out, query, pages, context, scoring)


@pytest.mark.parametrize(
    ("window", "bits", "splits"), [(1, 4, 2), (16, 16, 2), (23, 4, 1), (23, 4, 2), (4096, 16, 1)]
)
def test_a_window_hides_what_lies_behind(kernel, device, bits, window, splits):
    query, pages, context = case(device, bits=bits, lengths=(50, 7))
    scoring = Scoring(softmax_scale=0.1, window=window)

    out = attend(kernel, query, pages, context, scoring, config_of(kernel, splits))

    assert_near(out, query, pages, context, scoring)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_soft_cap_bounds_the_scores(kernel, device, bits):
    query, pages, context = case(device, bits=bits)
    scoring = Scoring(softmax_scale=3.0, soft_cap=5.0)

    out = attend(kernel, query, pages, context, scoring, config_of(kernel, 2))

    assert_near(out, query, pages, context, scoring)


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_queries_of_any_size_lose_nothing_in_half_precision(kernel, device, factor):
    query, pages, context = case(device, bits=4)
    scoring = Scoring(softmax_scale=0.125 / factor)
    query = query.mul(factor).bfloat16()

    out = attend(kernel, query, pages, context, scoring, config_of(kernel))

    assert_near(out, query, pages, context, scoring)


def test_a_sequence_gives_the_same_bits_in_every_batch(kernel, device):
    query, pages, context = case(device, bits=4, lengths=(37, 60, 5))
    scoring = Scoring(softmax_scale=0.125)
    config = config_of(kernel, 3)

    together = attend(kernel, query, pages, context, scoring, config)

    for b in range(3):
        alone = PagedContext(
            block_table=context.block_table[b : b + 1], lengths=context.lengths[b : b + 1]
        )
        assert torch.equal(
            attend(kernel, query[b : b + 1], pages, alone, scoring, config), together[b : b + 1]
        )


def test_larger_pages_change_nothing(kernel, device):
    pages, table, lengths = filled_pages(
        (70,), 2, 64, bits=4, page_size=64, dtype=torch.float16, device=device
    )
    query = torch.randn(1, 4, 64, device=device).half()
    context = PagedContext(block_table=table, lengths=lengths)
    scoring = Scoring(softmax_scale=0.125)

    out = attend(kernel, query, pages, context, scoring, config_of(kernel))

    assert_near(out, query, pages, context, scoring)


def test_splits_depend_on_the_model_and_not_on_the_batch(kernel):
    pages = KvPages.allocate(1, 8, 128, bits=4)
    short, long = (kernel.select_config(pages, context, group=4) for context in (128, 32768))

    assert short.splits == 1
    assert long.splits == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q[..., :32], "adjacent dims"),
        (lambda q: q[:, :3], "do not divide"),
        (lambda q: q.float(), "float16 or bfloat16"),
        (lambda q: q.bfloat16(), "pages are"),
    ],
)
def test_queries_that_do_not_fit_are_refused(change, message):
    query, pages, context = case("cpu", bits=16, kv_heads=2)

    with pytest.raises(ValueError, match=message):
        paged_attention(change(query), pages, context, Scoring(softmax_scale=1.0))


def test_a_cpu_gets_the_reference():
    query, pages, context = case("cpu", bits=4)
    scoring = Scoring(softmax_scale=0.125)

    out = paged_attention(query, pages, context, scoring)

    assert torch.equal(out, attention_reference(query, pages, context, scoring).half())
