import pytest
import torch

from kernels.activation_quant import quantize_activations
from kernels.tokens import TokenCodes


@pytest.mark.parametrize("bits", range(2, 9))
def test_shifted_codes_stand_for_the_same_values(bits):
    activations = quantize_activations(torch.randn(5, 96), bits)

    tokens = TokenCodes.from_activations(activations, groups=3, columns=128)

    centred = tokens.codes[:, :96].int() - tokens.zero_point[:, None]
    assert torch.equal(centred, activations.codes.int() - activations.zero_point)
    assert not tokens.codes[:, 96:].any()
    assert torch.equal(tokens.sums, tokens.codes[:, :96].int().view(5, 3, 32).sum(-1).int())


def test_groups_that_do_not_divide_the_columns_are_refused():
    activations = quantize_activations(torch.randn(2, 96), 8)

    with pytest.raises(ValueError, match="5 groups"):
        TokenCodes.from_activations(activations, groups=5)
