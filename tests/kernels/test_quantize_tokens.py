import sys

import pytest
import torch

from kernels.layer_math import Gate, Norm, NormKind, apply_gate
from kernels.linear import integer_linear, make_counters
from kernels.token_parts import make_slots, parts_that_fit, slots_of
from tests.kernels.small_ops import load_small_op
from tests.kernels.tile_cases import random_codes, sliced_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def ops(monkeypatch):
    return load_small_op("quantize_tokens", ("_token_kernel", ["token_kernel"]), monkeypatch)


def norm_of(kind, k, dtype, device):
    bias = torch.randn(k, device=device).to(dtype) if kind is NormKind.LAYER else None
    weight = (torch.rand(k, device=device) + 0.5).to(dtype)
    return Norm(kind=kind, weight=weight, bias=bias, eps=1e-5)


def poisoned(ops, m, k, form, device):
    columns = form.columns or k
    tokens = ops.quantize_tokens_reference(torch.zeros(m, k, device=device), form)
    for each in (tokens.codes, tokens.scale, tokens.zero_point, tokens.sums):
        each.fill_(77)
    assert tokens.codes.shape == (m, columns)
    return tokens


def assert_equal(got, expected):
    for field in ("scale", "zero_point", "codes", "sums"):
        assert torch.equal(getattr(got, field), getattr(expected, field)), field
    assert got.bits == expected.bits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_scales_zero_points_and_sums_are_those_of_torch(ops, device, bits, dtype):
    form = ops.TokenForm(bits=bits, groups=4, columns=160)
    x = (torch.randn(5, 128, device=device) * 3 + 1).to(dtype)

    tokens = ops.quantize_tokens(x, form, out=poisoned(ops, 5, 128, form, device))

    assert_equal(tokens, ops.quantize_tokens_reference(x, form))


@pytest.mark.parametrize("k", [1, 7, 40, 172, 1000])
def test_any_number_of_features_fits(ops, device, k):
    form = ops.TokenForm(bits=8, columns=k + 3)
    x = torch.randn(3, k, device=device)

    tokens = ops.quantize_tokens(x, form, out=poisoned(ops, 3, k, form, device))

    assert_equal(tokens, ops.quantize_tokens_reference(x, form))


def test_ties_constants_and_outliers_are_rounded_as_torch_rounds_them(ops, device):
    form = ops.TokenForm(bits=8)
    x = torch.zeros(6, 64, device=device)
    x[0, :6] = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 255.0])
    x[1] = 3.25
    x[2] = -3.25
    x[3, 5] = 1e30
    x[4, 6] = -1e-30
    x[5] = torch.linspace(-1, 1, 64)

    assert_equal(ops.quantize_tokens(x, form), ops.quantize_tokens_reference(x, form))


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_value_that_is_not_finite_marks_its_token_and_no_other(ops, device, value):
    x = torch.randn(3, 64, device=device)
    x[1, 4] = value
    x[1, 5] = -3e38
    form = ops.TokenForm(bits=8)
    others = torch.tensor([0, 2])

    tokens = ops.quantize_tokens(x, form)

    assert bool(tokens.scale[1].isnan())
    expected = ops.quantize_tokens_reference(x[others], form)
    assert torch.equal(tokens.scale[others], expected.scale)
    assert torch.equal(tokens.codes[others], expected.codes)


@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [256, 172])
def test_a_norm_and_the_residual_sum_are_those_of_torch(ops, device, kind, dtype, k):
    norm = norm_of(kind, k, dtype, device)
    form = ops.TokenForm(bits=8)
    x, residual = (torch.randn(4, k, device=device).to(dtype) for _ in range(2))

    alone = ops.quantize_normed(x, norm, form)
    added = ops.quantize_normed(x, norm, form, residual=residual)

    assert_equal(alone.tokens, ops.quantize_normed_reference(x, norm, form).tokens)
    assert alone.residual is x
    expected = ops.quantize_normed_reference(x, norm, form, residual=residual)
    assert_equal(added.tokens, expected.tokens)
    assert torch.equal(added.residual, expected.residual)


def test_the_residual_stream_may_be_written_in_place(ops, device):
    norm = norm_of(NormKind.RMS, 64, torch.bfloat16, device)
    form = ops.TokenForm(bits=4)
    x, stream = (torch.randn(2, 64, device=device).bfloat16() for _ in range(2))
    expected = ops.quantize_normed_reference(x, norm, form, residual=stream)
    out = ops.NormedTokens(tokens=poisoned(ops, 2, 64, form, device), residual=stream)

    got = ops.quantize_normed(x, norm, form, residual=stream, out=out)

    assert got.residual is stream
    assert torch.equal(stream, expected.residual)
    assert_equal(got.tokens, expected.tokens)


@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_that_of_torch(ops, device, gate, dtype):
    form = ops.TokenForm(bits=8, groups=2)
    x = (torch.randn(3, 512, device=device) * 20).to(dtype)

    assert_equal(ops.quantize_gated(x, gate, form), ops.quantize_gated_reference(x, gate, form))


def test_rows_may_lie_apart(ops, device):
    form = ops.TokenForm(bits=6)
    x = torch.randn(4, 96, device=device)[:, 16:80]

    assert_equal(ops.quantize_tokens(x, form), ops.quantize_tokens_reference(x, form))


def test_no_tokens_launch_nothing(ops, device):
    tokens = ops.quantize_tokens(torch.zeros(0, 16, device=device), ops.TokenForm(bits=8))

    assert tokens.codes.shape == (0, 16)


def test_what_does_not_fit_is_refused_by_name(ops):
    form = ops.TokenForm(bits=8)
    x = torch.zeros(2, 96)

    with pytest.raises(ValueError, match="bits = 9"):
        ops.TokenForm(bits=9)
    with pytest.raises(ValueError, match="5 groups and 96 columns"):
        ops.quantize_tokens(x, ops.TokenForm(bits=8, groups=5))
    with pytest.raises(ValueError, match="2 groups and 96 columns"):
        ops.quantize_tokens(x, ops.TokenForm(bits=8, groups=2))
    with pytest.raises(ValueError, match="strides"):
        ops.quantize_tokens(x.t(), form)
    with pytest.raises(ValueError, match="no halves"):
        ops.quantize_gated(torch.zeros(1, 3), Gate.SILU, form)
    with pytest.raises(ValueError, match="a norm of"):
        ops.quantize_normed(x, norm_of(NormKind.RMS, 4, x.dtype, "cpu"), form)
    with pytest.raises(ValueError, match="bias"):
        Norm(kind=NormKind.LAYER, weight=x[0], eps=1e-5)


def test_the_launch_is_chosen_by_columns_and_only_few_tokens_start_early(ops):
    tuned = ops.LaunchConfig(num_warps=8, launch_pdl=True)

    assert ops.select_config(4096).num_warps == 8
    assert ops.select_config(512).num_warps == 4
    assert ops.select_config(4096, m=16).launch_pdl
    assert not ops.select_config(4096, m=64).launch_pdl
    assert ops.select_config(4096, {4096: tuned}) is tuned


@pytest.fixture
def layer_ops(ops, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels.quantize_tokens", ops)
    return load_small_op("layer_ops", None, monkeypatch)


@pytest.fixture
def slots(device):
    return make_slots(torch.device(device))


@pytest.mark.parametrize(("k", "columns", "parts"), [(688, 704, 4), (40, 40, 8), (1000, 1003, 2)])
def test_parts_of_a_gate_give_the_codes_of_one_program(ops, device, slots, k, columns, parts):
    form = ops.TokenForm(bits=8, columns=columns)
    config = ops.LaunchConfig(num_warps=4, parts=parts)
    x = torch.randn(2, 2 * k, device=device).to(torch.float16)
    out = poisoned(ops, 2, k, form, device)

    tokens = ops.quantize_gated(x, Gate.SILU, form, out=out, config=config, slots=slots)

    assert_equal(tokens, ops.quantize_gated_reference(x, Gate.SILU, form))


@pytest.mark.parametrize(("bits", "groups", "parts"), [(4, 8, 4), (3, 2, 4), (8, 64, 8)])
def test_parts_own_whole_groups(ops, device, slots, bits, groups, parts):
    form = ops.TokenForm(bits=bits, groups=groups, columns=1040)
    config = ops.LaunchConfig(num_warps=4, parts=parts)
    x = torch.randn(2, 2048, device=device)
    out = poisoned(ops, 2, 1024, form, device)

    tokens = ops.quantize_gated(x, Gate.GELU_TANH, form, out=out, config=config, slots=slots)

    assert_equal(tokens, ops.quantize_gated_reference(x, Gate.GELU_TANH, form))


@pytest.mark.usefixtures("poisoned_empty")
def test_parts_learn_of_a_value_that_is_not_finite(ops, device, slots):
    form = ops.TokenForm(bits=8)
    config = ops.LaunchConfig(num_warps=4, parts=4)
    x = torch.randn(3, 256, device=device)
    x[1, 200] = float("nan")
    x[2] = 0.0

    tokens = ops.quantize_gated(x, Gate.SILU, form, config=config, slots=slots)

    assert bool(tokens.scale[1].isnan())
    expected = ops.quantize_gated_reference(x[[0, 2]], Gate.SILU, form)
    assert torch.equal(tokens.scale[[0, 2]], expected.scale)
    assert torch.equal(tokens.codes[[0, 2]], expected.codes)
    assert torch.equal(tokens.sums[[0, 2]], expected.sums)


def test_only_few_wide_gated_tokens_are_shared_and_only_where_parts_can_meet(ops, slots):
    assert ops.select_config(16384, gated=True).parts == 16
    assert ops.select_config(32768, m=8, gated=True).parts == 16
    for alone in (
        ops.select_config(16384),
        ops.select_config(16384, m=9, gated=True),
        ops.select_config(4096, gated=True),
    ):
        assert alone.parts == 1
    assert parts_that_fit(16, 8, slots) == 16
    assert parts_that_fit(16, 32, slots) == 4
    assert parts_that_fit(16, 1, None) == 1
    with pytest.raises(ValueError, match="12 parts"):
        parts_that_fit(12, 1, slots)


def test_parts_share_values_too(ops, layer_ops, device, slots):
    x = torch.randn(2, 200, device=device).to(torch.float16)
    config = ops.LaunchConfig(num_warps=4, parts=4)
    out = x.new_full((2, 100), 77)

    values = layer_ops.gate_values(x, Gate.SILU, out=out, config=config, slots=slots)

    assert torch.equal(values, apply_gate(x, Gate.SILU))


@pytest.mark.gpu
def test_a_launch_marks_the_slots_of_its_tokens_and_no_others(ops, device, slots):
    form, config = ops.TokenForm(bits=8), ops.LaunchConfig(num_warps=4, parts=4)
    x = torch.randn(3, 256, device=device)

    ops.quantize_gated(x, Gate.SILU, form, config=config, slots=slots)

    marks = slots < 0
    assert bool(slots_of(marks, 4)[:12].all())
    assert int(marks.sum()) == 12


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "groups"), [(11008, 1), (28672, 1), (14336, 112)])
def test_parts_of_wide_gates_are_right_launch_after_launch(ops, device, slots, k, groups):
    form = ops.TokenForm(bits=8, groups=groups, columns=k + 256)
    inputs = [torch.randn(m, 2 * k, device=device).bfloat16() for m in (1, 8, 3)]
    expected = [ops.quantize_gated_reference(x, Gate.SILU, form) for x in inputs]

    # who is late differs from launch to launch, and so does what slots hold
    found = [
        ops.quantize_gated(inputs[i % 3], Gate.SILU, form, slots=slots, config=config)
        for i in range(120)
        for config in [ops.LaunchConfig(num_warps=4, parts=1 << i % 6, launch_pdl=i % 2 == 0)]
    ]

    for i, tokens in enumerate(found):
        assert_equal(tokens, expected[i % 3])


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [2, 16, 32])
def test_parts_between_products_are_right_in_every_replay_of_a_graph(ops, device, slots, parts):
    k, replays = 11008, 200
    dtype = torch.bfloat16
    gate_up, down = (
        sliced_weight(random_codes(n, columns, 4), 4, device=device)[0]
        for n, columns in ((2 * k, 512), (512, k))
    )
    counters = make_counters(torch.device(device))
    config = ops.LaunchConfig(num_warps=4, parts=parts, launch_pdl=True)
    form = ops.TokenForm(bits=8, columns=down.columns)
    entering = ops.quantize_tokens(
        torch.randn(2, 512, device=device).to(dtype),
        ops.TokenForm(bits=8, columns=gate_up.columns),
    )

    def step():
        for _ in range(3):
            wide = integer_linear(entering, gate_up, out_dtype=dtype, counters=counters)
            gated = ops.quantize_gated(wide, Gate.SILU, form, config=config, slots=slots)
            out = integer_linear(gated, down, out_dtype=dtype, counters=counters)
        return wide, gated, out

    wide, gated, out = step()
    right, last = ops.quantize_gated_reference(wide, Gate.SILU, form), out.clone()
    assert_equal(gated, right)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, gated, out = step()

    for _ in range(replays):
        for each in (gated.codes, gated.scale, gated.zero_point, gated.sums):
            each.fill_(77)
        graph.replay()

        assert_equal(gated, right)
        assert torch.equal(out, last)
