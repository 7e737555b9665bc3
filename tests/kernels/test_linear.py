import pytest
import torch

from kernels import linear, tile_config
from kernels.activation_quant import quantize_activations
from kernels.layouts import pack_codes
from kernels.linear import (
    Plan,
    integer_linear,
    key_of,
    launch_half,
    plan_linear,
    wants_fragments,
    weight_only_linear,
)
from kernels.sliced import slice_weight, unslice_codes
from kernels.sliced_reference import sliced_linear_reference
from kernels.tables import ConfigTable, InvalidTableError, Route, TableEntry, TableKey
from kernels.tokens import TokenCodes

EMPTY = ConfigTable(gpu="none", entries={})


def key(w_bits=2, m=1, **others):
    return TableKey.of(**{"a_bits": 8, "w_bits": w_bits, "group": -1, "n": 512, "k": 512, "m": m,
                          **others})  # fmt: skip


def table_of(key, route, **config):
    entry = TableEntry(key=key, route=route, us=1.0, config=config)
    return ConfigTable(gpu="some gpu", entries={key: entry})


def operands(bits=3, n=70, k=96, m=3, groups=1):
    weight = slice_weight(
        pack_codes(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits),
        torch.rand(n, groups).half(),
        torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8),
        k,
    )
    activations = quantize_activations(torch.randn(m, k), 8)
    tokens = TokenCodes.from_activations(activations, groups=groups, columns=weight.columns)
    return tokens, weight


@pytest.mark.parametrize(
    ("w_bits", "m", "route"),
    [(1, 2, "decode"), (1, 3, "tile"), (2, 4, "decode"), (2, 5, "tile"), (4, 8, "decode"),
     (4, 9, "tile"), (8, 8, "decode"), (2, 512, "tile"), (2, 2048, "prefill")],
)  # fmt: skip
def test_without_a_table_few_tokens_decode_and_many_are_pipelined(w_bits, m, route):
    assert plan_linear(key(w_bits, m), EMPTY) == Plan(route=Route(route))


@pytest.mark.parametrize(
    ("w_bits", "group", "m", "route"),
    [(4, 128, 64, "tile"), (4, 128, 128, "prefill"), (2, 64, 2048, "prefill"),
     (4, 32, 2048, "tile"), (8, 128, 2048, "tile")],
)  # fmt: skip
def test_without_a_table_groups_are_pipelined_where_codes_less_zero_points_are_bytes(
    w_bits, group, m, route
):
    assert plan_linear(key(w_bits, m, group=group), EMPTY) == Plan(route=Route(route))


def test_without_a_table_few_outputs_are_not_pipelined():
    assert plan_linear(key(4, 2048, n=511), EMPTY) == Plan(route=Route.TILE)


def test_what_the_pipelined_kernel_cannot_run_goes_to_tiles(monkeypatch):
    tokens, weight = operands(groups=3)
    launched = []
    monkeypatch.setattr(linear, "tile_linear", lambda *_, **options: launched.append(options))

    linear.launch_plan(Plan(route=Route.PREFILL), tokens, weight)

    assert len(launched) == 1


def test_a_table_decides_route_and_configuration():
    config = tile_config.LaunchConfig(
        block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3, splits=2
    )
    fields = {"block_m": 16, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3,
              "splits": 2}  # fmt: skip

    plan = plan_linear(key(m=1), table_of(key(m=1), Route.TILE, **fields))

    assert plan == Plan(route=Route.TILE, config=config)


def test_a_configuration_that_no_kernel_knows_is_refused_by_its_key():
    with pytest.raises(InvalidTableError, match="some gpu: a8 w2 g-1 512x512 m1"):
        plan_linear(key(), table_of(key(), Route.DECODE, block_q=3))


@pytest.mark.parametrize(("groups", "group"), [(1, -1), (3, 32)])
def test_a_weight_knows_its_key(groups, group):
    _, weight = operands(groups=groups)

    expected = TableKey(a_bits=8, w_bits=3, group=group, n=70, k=96, m=4)
    assert key_of(weight, m=3, a_bits=8) == expected


def test_a_cpu_answers_with_the_reference():
    tokens, weight = operands()
    bias = torch.randn(70)

    out = integer_linear(tokens, weight, bias, out_dtype=torch.float32)

    expected = sliced_linear_reference(tokens, weight, bias, out_dtype=torch.float32)
    assert torch.equal(out, expected)


def test_every_route_has_a_configuration():
    assert set(linear.CONFIGS) == set(Route)


@pytest.mark.parametrize(("m", "route"), [(1, "half_decode"), (8, "half_decode"), (9, "half")])
def test_few_tokens_of_16_bits_decode_too(m, route):
    assert plan_linear(key(m=m, a_bits=16), EMPTY) == Plan(route=Route(route))


def test_routes_of_codes_do_not_multiply_16_bit_activations():
    _, weight = operands()

    with pytest.raises(ValueError, match="route tile does not multiply 16-bit"):
        launch_half(Plan(route=Route.TILE), torch.zeros(1, 96).half(), weight)


@pytest.mark.parametrize("bits", [3, 8])
def test_a_cpu_multiplies_16_bit_activations_by_weights_rounded_once(bits):
    _, weight = operands(bits=bits, groups=3)
    x, bias = torch.randn(4, 96), torch.randn(70)
    shift = 128 if bits == 8 else 0
    codes = unslice_codes(weight).double().sub(shift).view(70, 3, 32)
    w = (codes - weight.zero_point[:70, :, None]) * weight.scale[:70, :, None].double()

    out = weight_only_linear(x, weight, bias)

    expected = (x.double() @ w.view(70, 96).t() + bias).float()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=5e-3)


def test_fragments_are_wanted_where_the_binary_tensor_core_is_fastest():
    config = {"row_tiles": 16, "column_tiles": 8, "warps_n": 4, "warps_other": 2, "steps": 2}
    asked = key(m=2048, a_bits=2)
    table = table_of(asked, Route.BINARY, **config)

    assert wants_fragments(key(m=1, a_bits=2), table)
    assert not wants_fragments(key(m=1, a_bits=8), table)
    assert plan_linear(asked, table, with_fragments=True).route is Route.BINARY
    assert plan_linear(asked, table).route is Route.PREFILL


def test_a_split_launch_counts_in_what_it_is_given():
    tokens, weight = operands(n=200, k=512)
    config = tile_config.LaunchConfig(
        block_m=8, block_n=64, block_k=32, num_warps=4, num_stages=2, splits=3
    )
    counters = torch.zeros(64, dtype=torch.int32)

    workspace = linear._workspace(config, tokens, weight, counters)  # noqa: SLF001  sizes matter

    assert workspace.arrivals is counters
    assert workspace.partials.numel() == 3 * 4 * 64 * 8
    assert linear._workspace(config, tokens, weight, None) is None  # noqa: SLF001  as above
