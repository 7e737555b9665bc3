"""A hundred launches of every kind give the same bits; only a GPU can differ from itself."""

import pytest
import torch

from kernels import sampling
from kernels.attention import PagedContext, Scoring
from kernels.binary_linear import ProductShape, select_config
from kernels.decode_linear import LaunchConfig as DecodeConfig
from kernels.fragments import ColumnOrder, FragmentWeight
from kernels.half_linear import HalfConfig
from kernels.layer_math import Gate
from kernels.layouts import pack_codes
from kernels.linear import (
    Plan,
    launch_binary,
    launch_half,
    launch_plan,
    make_counters,
    weight_only_linear,
)
from kernels.paged_attention import paged_attention
from kernels.paged_prefill import paged_prefill
from kernels.quantize_tokens import TokenForm, quantize_gated
from kernels.tables import Route
from kernels.tile_config import LaunchConfig as TileConfig
from tests.kernels.kv_cases import filled_pages
from tests.kernels.test_sampling import ALL, mixed_rows
from tests.kernels.tile_cases import random_codes, sliced_weight, token_codes

REPEATS = 100

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]


def assert_repeats(launch):
    first = [each.clone() for each in launch()]

    for _ in range(REPEATS - 1):
        for before, now in zip(first, launch(), strict=True):
            assert torch.equal(before, now)


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize(
    ("plan", "m"),
    [
        (Plan(route=Route.DECODE), 1),
        (Plan(route=Route.DECODE), 5),
        (
            Plan(
                route=Route.DECODE,
                config=DecodeConfig(
                    lane_rows=2, thread_rows=1, turn_blocks=1, num_warps=1, split_k=4
                ),
            ),
            3,
        ),
        (
            Plan(
                route=Route.TILE,
                config=TileConfig(
                    block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3, splits=4
                ),
            ),
            13,
        ),
        (Plan(route=Route.PREFILL), 300),
    ],
)
def test_integer_products_repeat_themselves(plan, m, groups):
    weight, _ = sliced_weight(random_codes(320, 2048, 3), 3, groups=groups, device="cuda")
    tokens, counters = token_codes(m, weight, 8, device="cuda"), make_counters(torch.device("cuda"))

    assert_repeats(lambda: (launch_plan(plan, tokens, weight, counters=counters),))


@pytest.mark.parametrize(("m", "plan"), [(2, None), (33, HalfConfig)])
def test_products_of_16_bits_repeat_themselves(m, plan):
    weight, _ = sliced_weight(random_codes(320, 2048, 4), 4, device="cuda")
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)

    if plan is None:
        assert_repeats(lambda: (weight_only_linear(x, weight),))
        return
    config = plan(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3, splits=4)
    assert_repeats(lambda: (launch_half(Plan(route=Route.HALF, config=config), x, weight),))


def test_binary_products_repeat_themselves():
    codes = random_codes(320, 2048, 2)
    weight, _ = sliced_weight(codes, 2, device="cuda")
    fragments = FragmentWeight.from_stored(
        pack_codes(codes, 2).cuda(),
        torch.rand(320, 1).half().cuda(),
        torch.randint(0, 4, (320, 1)).cuda(),
        2048,
    )
    tokens = token_codes(130, weight, 2, device="cuda")

    shape = ProductShape(
        order=ColumnOrder.TOKENS, m=130, n=320, k=2048, weight_bits=2, token_bits=2
    )
    plan = Plan(route=Route.BINARY, config=select_config(shape))

    assert_repeats(lambda: (launch_binary(plan, tokens, fragments),))


@pytest.mark.parametrize("bits", [16, 4])
def test_attention_repeats_itself(bits):
    lengths = [700, 33, 1]
    pages, table, held = filled_pages(
        lengths, 2, 128, bits=bits, dtype=torch.bfloat16, device="cuda"
    )
    context, scoring = PagedContext(block_table=table, lengths=held), Scoring(softmax_scale=0.1)
    query = torch.randn(3, 8, 128, device="cuda", dtype=torch.bfloat16)
    chunks = torch.randn(90, 8, 128, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 60, 89, 90], dtype=torch.int32, device="cuda")

    assert_repeats(lambda: (paged_attention(query, pages, context, scoring),))
    assert_repeats(lambda: (paged_prefill(chunks, pages, context, scoring, cu_seqlens),))


def test_gates_and_draws_repeat_themselves():
    wide = torch.randn(3, 2 * 11008, device="cuda", dtype=torch.bfloat16)

    def gated():
        tokens = quantize_gated(wide, Gate.SILU, TokenForm(bits=8))
        return tokens.codes, tokens.scale, tokens.zero_point, tokens.sums

    logits = torch.randn(8, 32000, device="cuda")
    rows = mixed_rows(sampling, "cuda")

    assert_repeats(gated)
    assert_repeats(lambda: (sampling.sample_tokens(logits, rows, sampling.Filters(**ALL)),))
