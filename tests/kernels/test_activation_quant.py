import pytest
import torch

from kernels.activation_quant import (
    MIN_ACTIVATION_SCALE,
    dequantize_activations,
    quantize_activations,
)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_stays_within_half_a_step(bits, dtype):
    x = torch.randn(17, 65).to(dtype)

    tokens = quantize_activations(x, bits)

    error = (dequantize_activations(tokens) - x.float()).abs()
    # the ends of the range may be cut by the rounding of the zero-point: half a step more
    assert bool((error <= tokens.scale * 1.0001).all())
    assert error.mean() < 0.3 * tokens.scale.mean()
    assert int(tokens.codes.max()) < 1 << bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_follow_the_formula_step_by_step(bits):
    x = torch.randn(9, 40)
    top = 2**bits - 1

    tokens = quantize_activations(x, bits)

    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-5)
    zero = torch.round(-low / scale)
    assert torch.equal(tokens.scale, scale)
    assert torch.equal(tokens.zero_point, zero.int())
    assert torch.equal(tokens.codes, (torch.round(x / scale) + zero).clamp(0, top).byte())


def test_ties_round_to_even():
    # the range 0 .. 255 makes the scale exactly one
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.5, 255.0]])

    assert quantize_activations(x, 8).codes.tolist() == [[0, 0, 2, 2, 4, 255]]


def test_zero_is_exact_in_every_token():
    x = torch.randn(50, 30) + 3
    x[:, 7] = 0

    assert bool((dequantize_activations(quantize_activations(x, 4))[:, 7] == 0).all())


def test_a_token_of_zeros_stays_zero():
    tokens = quantize_activations(torch.zeros(2, 8), 8)

    assert tokens.scale.tolist() == [[pytest.approx(MIN_ACTIVATION_SCALE)]] * 2
    assert not dequantize_activations(tokens).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_marks_its_token_and_no_other(value):
    x = torch.randn(3, 8)
    x[1, 4] = value

    restored = dequantize_activations(quantize_activations(x, 8))

    assert bool(restored[1].isnan().all())
    assert torch.equal(restored[[0, 2]], dequantize_activations(quantize_activations(x[[0, 2]], 8)))


def test_strided_tokens_give_the_same_codes():
    x = torch.randn(33, 12)

    assert torch.equal(
        quantize_activations(x.t(), 6).codes, quantize_activations(x.t().contiguous(), 6).codes
    )


def test_the_input_is_left_alone():
    x = torch.randn(4, 16)
    before = x.clone()

    quantize_activations(x, 8)

    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        quantize_activations(torch.zeros(1, 4), bits)
