import pytest
import torch

from kernels.layer_math import Gate, Norm, NormKind, add_and_normalize, apply_gate, apply_norm
from tests.kernels.small_ops import load_small_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def ops(monkeypatch):
    quantize = load_small_op("quantize_tokens", ("_token_kernel", ["token_kernel"]), monkeypatch)
    layer_ops = load_small_op("layer_ops", None, monkeypatch)
    monkeypatch.setattr(layer_ops, "launch_tokens", quantize.launch_tokens)
    return layer_ops


def norm_of(kind, k, dtype, device="cpu"):
    bias = torch.randn(k, device=device).to(dtype) if kind is NormKind.LAYER else None
    weight = (torch.rand(k, device=device) + 0.5).to(dtype)
    return Norm(kind=kind, weight=weight, bias=bias, eps=1e-5)


@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_write_what_torch_gives(ops, device, kind, dtype):
    norm = norm_of(kind, 136, dtype, device)
    x, residual = (torch.randn(3, 136, device=device).to(dtype) for _ in range(2))
    poison = ops.NormedValues(
        values=torch.full_like(x, float("nan")), residual=torch.full_like(x, float("nan"))
    )

    alone = ops.normalize_values(x, norm)
    added = ops.normalize_values(x, norm, residual=residual, out=poison)

    assert torch.equal(alone.values, apply_norm(x, norm))
    values, total = add_and_normalize(x, residual, norm)
    assert torch.equal(added.values, values)
    assert torch.equal(added.residual, total)


@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_write_what_torch_gives(ops, device, gate, dtype):
    x = (torch.randn(3, 272, device=device) * 10).to(dtype)
    out = torch.full((3, 136), float("nan"), dtype=dtype, device=device)

    values = ops.gate_values(x, gate, out=out)

    assert values is out
    assert torch.equal(values, apply_gate(x, gate))


@pytest.mark.parametrize("kind", NormKind)
def test_the_norms_are_those_of_float64(kind):
    norm = norm_of(kind, 1000, torch.float32)
    x = torch.randn(4, 1000) + 2
    exact = x.double()

    normed = apply_norm(x, norm)

    if kind is NormKind.LAYER:
        expected = torch.nn.functional.layer_norm(
            exact, (1000,), norm.weight.double(), norm.bias.double(), norm.eps
        )
    else:
        gain = norm.weight.double() + (kind is NormKind.RMS_PLUS_ONE)
        expected = exact / (exact.square().mean(1, keepdim=True) + norm.eps).sqrt() * gain
    # three roundings of the norm, one of the weight, one of the bias
    torch.testing.assert_close(normed.double(), expected, rtol=4e-7, atol=8e-7)


@pytest.mark.parametrize("gate", Gate)
def test_the_gates_are_those_of_float64(gate):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.ones(4001)])[None]
    exact = x[:, :4001].double()

    gated = apply_gate(x, gate)

    silu = torch.nn.functional.silu(exact)
    gelu = torch.nn.functional.gelu(exact, approximate="tanh")
    # an exponent of up to 17 carries its own rounding, 17 * 2^-24, into the result; GELU's of up to
    # 212 is where the result has vanished
    expected = silu if gate is Gate.SILU else gelu
    torch.testing.assert_close(gated.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("half", "head_dim"), [(16, 32), (12, 40)])
def test_heads_turn_as_in_torch_and_the_rest_stays(monkeypatch, device, dtype, half, head_dim):
    rotary = load_small_op("rotary", None, monkeypatch)
    frequencies = 10000 ** -(torch.arange(half, device=device) / half)
    table = rotary.RotaryTable.of_frequencies(frequencies, 50, scaling=1.1)
    x = torch.randn(3, 7 * head_dim + 5, device=device).to(dtype)
    positions = torch.tensor([0, 49, 17], device=device)
    expected = rotary.rotate_reference(x, positions, table, heads=5, head_dim=head_dim)

    got = rotary.rotate(x, positions.int(), table, heads=5, head_dim=head_dim)

    assert got is x
    assert torch.equal(got, expected)


def test_a_turn_keeps_lengths_and_depends_on_the_distance_alone(monkeypatch):
    rotary = load_small_op("rotary", None, monkeypatch)
    table = rotary.RotaryTable.of_frequencies(10000 ** -(torch.arange(8) / 8), 100)
    q, k = torch.randn(2, 16).double()

    def score(at_q, at_k):
        rows = torch.stack([q, k])
        turned = rotary.rotate_reference(
            rows, torch.tensor([at_q, at_k]), table, heads=1, head_dim=16
        )
        assert turned.norm(dim=1).allclose(rows.norm(dim=1))
        return turned[0] @ turned[1]

    assert score(12, 5).item() == pytest.approx(score(90, 83).item(), abs=1e-4)


def test_what_does_not_fit_is_refused_by_name(monkeypatch):
    rotary = load_small_op("rotary", None, monkeypatch)
    table = rotary.RotaryTable.of_frequencies(torch.ones(8), 4)
    x, positions = torch.zeros(2, 32), torch.zeros(2, dtype=torch.int32)

    with pytest.raises(ValueError, match="3 heads of 16"):
        rotary.rotate(x, positions, table, heads=3, head_dim=16)
    with pytest.raises(ValueError, match="16 channels"):
        rotary.rotate(x, positions, table, heads=2, head_dim=8)
    with pytest.raises(ValueError, match="positions"):
        rotary.rotate(x, positions[:1], table, heads=2, head_dim=16)
