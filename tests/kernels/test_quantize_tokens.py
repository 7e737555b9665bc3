import pytest
import torch

from kernels.layer_math import Gate, Norm, NormKind
from tests.kernels.small_ops import load_small_op

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
