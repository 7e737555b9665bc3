import pytest
import torch

from kernels.activation_rounding import round_activations, round_activations_reference


def both_ways(function, x, bits, grad):
    x = x.clone().requires_grad_()
    out = function(x, bits)
    out.backward(grad)
    return out.detach(), x.grad


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 40, 64, 577])
def test_the_kernels_round_and_take_gradients_back_as_plain_torch_does(
    activation_rounding, device, bits, columns
):
    x = torch.randn(7, columns, device=device) * torch.logspace(-3, 3, 7, device=device)[:, None]
    grad = torch.randn(7, columns, device=device)
    wanted, wanted_grad = both_ways(round_activations_reference, x, bits, grad)

    found, found_grad = both_ways(activation_rounding.RoundedActivations.apply, x, bits, grad)

    assert torch.equal(found, wanted)
    torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "row",
    [
        [0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [-1.0, -2.0, -2.0], [1e-7, -1e-7, 0.0],
        [-3.0, 0.0, 0.0],
    ],
    ids=["zeros", "positive", "negative", "tiny", "zero is the top"],
)  # fmt: skip
def test_ends_of_a_range_share_its_gradient(activation_rounding, device, row):
    x, grad = torch.tensor([row], device=device), torch.tensor([[1.0, -2.0, 5.0]], device=device)
    wanted, wanted_grad = both_ways(round_activations_reference, x, 4, grad)

    found, found_grad = both_ways(activation_rounding.RoundedActivations.apply, x, 4, grad)

    assert torch.equal(found, wanted)
    torch.testing.assert_close(found_grad, wanted_grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_shows_and_touches_no_other(activation_rounding, device, value):
    x = torch.randn(3, 32, device=device)
    x[1, 5] = value

    found = activation_rounding.RoundedActivations.apply(x, 8)

    assert found[1].isnan().any()
    assert torch.equal(found[[0, 2]], round_activations_reference(x[[0, 2]], 8))


def test_half_precision_is_rounded_in_float32_and_its_gradient_comes_back_in_half(
    activation_rounding, device
):
    x, grad = torch.randn(2, 3, 64, device=device).bfloat16()

    found, found_grad = both_ways(activation_rounding.RoundedActivations.apply, x, 8, grad.float())

    assert torch.equal(found, round_activations_reference(x, 8))
    assert found_grad.dtype == torch.bfloat16


def test_leading_dimensions_stay(device):
    x = torch.randn(2, 3, 16, device=device)

    assert torch.equal(round_activations(x, 4), round_activations_reference(x, 4))
