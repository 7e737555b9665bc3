"""A half-step grid through layers: every product is that of the dequantized weight."""

import pytest
import torch

from engine.checkpoint.reader import load_checkpoint
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.operand import multiply_codes, pack_operand
from engine.modules.swap import quant_linears
from engine.numerics.affine import affine_params, quantize_weight, weight_range
from engine.spec import QuantSpec, WeightGrid
from kernels.activation_quant import dequantize_activations, quantize_activations
from kernels.int_linear import integer_linear
from tests.unit.engine.quantized_models import save_checkpoint

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
GRID = WeightGrid(bits=2, group_size=32, symmetric=False, bit_balance=False, half_step=True)


@pytest.fixture
def twin():
    torch.manual_seed(2)
    return FakeQuantLinear(torch.nn.Linear(96, 24), GRID, 8).eval()


@pytest.fixture
def x():
    return torch.randn(7, 96, generator=torch.Generator().manual_seed(3))


def exact_product(layer, x):
    seen = dequantize_activations(quantize_activations(x, 8)).double()
    return seen @ layer.dequantized().double().T + layer.bias.double()


def test_the_integer_product_is_that_of_the_dequantized_weight(twin, x):
    layer = twin.to_quant_linear().prepare()

    out = layer(x)

    torch.testing.assert_close(out.double(), exact_product(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, twin(x))


def test_training_sees_the_product_that_is_stored(twin, x):
    stored = twin(x)

    twin.train()

    torch.testing.assert_close(twin(x), stored, rtol=1e-5, atol=1e-5)


def test_planes_of_doubled_codes_give_the_product_of_the_processor(twin, x):
    weight = twin.weight.detach()
    params = affine_params(weight_range(weight, 32), GRID)
    codes = quantize_weight(weight, params, GRID)
    wanted = multiply_codes(x, codes, params, 8, twin.bias.detach())

    packed = pack_operand(codes, params)

    out = integer_linear(quantize_activations(x, 8), packed, twin.bias.detach())
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("a_bits", [8, 16])
def test_a_checkpoint_keeps_the_half_step(tmp_path, a_bits):
    spec = QuantSpec(w_bits=2, a_bits=a_bits, group_size=32, half_step=True)
    model, directory, _ = save_checkpoint(tmp_path, spec)
    with torch.inference_mode():
        expected = model(TOKENS).logits

    loaded = load_checkpoint(directory)

    with torch.inference_mode():
        assert torch.equal(loaded.model(TOKENS).logits, expected)
    assert all(each.grid.half_step for each in quant_linears(loaded.model).values())
