import pytest
import torch

from kernels.attended_tokens import attended_tokens
from kernels.attention import PagedContext, Scoring
from kernels.quantize_tokens import TokenForm
from kernels.token_parts import make_slots
from tests.kernels.kv_cases import INNER, filled_pages, fresh_module
from tests.kernels.small_ops import interpret_reductions


@pytest.fixture
def kernel(monkeypatch, device):
    """`kernels.attended_tokens` whose Triton kernels run here."""
    interpreted = device == "cpu"
    if interpreted:
        interpret_reductions(monkeypatch)
    inner = (*INNER, "paged_attention", "_token_kernel", "_token_tile", "quantize_tokens")
    return fresh_module(
        "attended_tokens", interpreted=interpreted, monkeypatch=monkeypatch, inner=inner
    )


def case(device, *, heads, head_dim, bits=8, lengths=(37, 0, 5)):
    pages, table, lengths = filled_pages(
        lengths, 1, head_dim, bits=bits, dtype=torch.float16, device=device
    )
    query = torch.randn(len(lengths), heads, head_dim).to(device, torch.float16)
    return query, pages, PagedContext(block_table=table, lengths=lengths)


def chunks_of(kernel, splits):
    """Chunks of sixteen tokens: some sequences have fewer than others."""
    return kernel.attention.LaunchConfig(
        splits=splits, min_chunk=16, block_t=16, num_warps=1, num_stages=2
    )


def assert_close(tokens, expected):
    torch.testing.assert_close(tokens.scale, expected.scale, rtol=1e-2, atol=1e-6)
    # weights of one rounding may move a value over the border of two codes
    assert int((tokens.codes.int() - expected.codes.int()).abs().max()) <= 1
    apart = tokens.codes.int() != expected.codes.int()
    assert float(apart.float().mean()) < 0.05
    sums = tokens.codes.int().view(len(tokens.codes), -1)
    assert torch.equal(tokens.sums.sum(1), sums.sum(1).int())


@pytest.mark.parametrize("splits", [1, 3, 6])
@pytest.mark.parametrize(("heads", "head_dim", "window"), [(4, 64, None), (3, 80, 20)])
def test_codes_are_those_of_attention_in_float64(kernel, device, heads, head_dim, window, splits):
    query, pages, context = case(device, heads=heads, head_dim=head_dim)
    scoring = Scoring(softmax_scale=head_dim**-0.5, window=window)
    form = TokenForm(bits=8, columns=heads * head_dim + 16)

    tokens = kernel.launch_attended_tokens(
        query, pages, context, scoring, form, attention_config=chunks_of(kernel, splits)
    )

    reference = kernel.attended_tokens_reference(query, pages, context, scoring, form)
    assert_close(tokens, reference)
    assert not tokens.codes[:, heads * head_dim :].any()


@pytest.mark.parametrize(("bits", "groups"), [(4, 4), (8, 2)])
def test_sums_of_groups_are_those_of_the_codes(kernel, device, bits, groups):
    query, pages, context = case(device, heads=4, head_dim=64)
    form = TokenForm(bits=bits, groups=groups)

    tokens = kernel.launch_attended_tokens(
        query, pages, context, Scoring(softmax_scale=0.1), form,
        attention_config=chunks_of(kernel, 4),
    )  # fmt: skip

    sums = tokens.codes.int().view(3, groups, -1).sum(-1, dtype=torch.int32)
    assert torch.equal(tokens.sums, sums)


@pytest.mark.parametrize(
    ("heads", "head_dim", "groups", "parts"),
    [(4, 64, 8, 2), (3, 80, 1, 2), (6, 96, 9, 4)],
)
def test_parts_that_share_a_sequence_give_the_bits_of_one_program(
    kernel, device, heads, head_dim, groups, parts
):
    query, pages, context = case(device, heads=heads, head_dim=head_dim, lengths=(37, 0))
    form = TokenForm(bits=8, groups=groups, columns=heads * head_dim + 16 * (groups == 1))
    slots = make_slots(torch.device(device))

    def launch(parts, slots):
        return kernel.launch_attended_tokens(
            query, pages, context, Scoring(softmax_scale=0.1), form,
            attention_config=chunks_of(kernel, 3), config=kernel.LaunchConfig(parts=parts),
            slots=slots,
        )  # fmt: skip

    alone = launch(1, None)
    # twice, as marks of slots differ from launch to launch
    for _ in range(2):
        shared = launch(parts, slots)

        assert torch.equal(shared.codes, alone.codes)
        assert torch.equal(shared.scale, alone.scale)
        assert torch.equal(shared.zero_point, alone.zero_point)
        assert torch.equal(shared.sums, alone.sums)


def test_more_chunks_than_registers_hold_are_added_in_the_same_order(kernel, device, monkeypatch):
    query, pages, context = case(device, heads=4, head_dim=64)

    def launch():
        return kernel.launch_attended_tokens(
            query, pages, context, Scoring(softmax_scale=0.1), TokenForm(bits=8),
            attention_config=chunks_of(kernel, 3),
        )  # fmt: skip

    together = launch()
    monkeypatch.setattr(kernel, "LOADED", 8)
    in_turns = launch()

    assert torch.equal(in_turns.codes, together.codes)
    assert torch.equal(in_turns.scale, together.scale)


def test_a_sequence_without_tokens_gives_the_codes_of_zeros(kernel, device):
    query, pages, context = case(device, heads=2, head_dim=64)

    tokens = kernel.launch_attended_tokens(
        query, pages, context, Scoring(softmax_scale=0.1), TokenForm(bits=8),
        attention_config=chunks_of(kernel, 4),
    )  # fmt: skip

    assert bool((tokens.codes[1] == tokens.zero_point[1]).all())


def test_queries_of_other_dims_than_the_pages_are_refused(device):
    query, pages, context = case(device, heads=2, head_dim=64)

    with pytest.raises(ValueError, match="queries must have 64 adjacent dims"):
        attended_tokens(
            query[..., :32], pages, context, Scoring(softmax_scale=1.0), TokenForm(bits=8)
        )
