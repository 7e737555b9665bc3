import pytest
import torch
from torch import nn

from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.linear import QuantLinear
from engine.modules.operand import multiply, operand_bytes
from engine.modules.swap import (
    named_linears,
    prepare_model,
    quant_linears,
    swap_linears,
    swap_modules,
)
from engine.numerics.affine import affine_params, weight_range
from engine.spec import QuantSpec
from kernels.linear import can_multiply


def layer_of(notation, *, bias=True, features=(96, 20)):
    linear = nn.Linear(*features, bias=bias)
    spec = QuantSpec.from_notation(notation)
    grid = spec.weight_grid("any")
    params = affine_params(weight_range(linear.weight.detach(), grid.group_size), grid)
    layer = QuantLinear.from_weight(
        linear.weight.detach(), params, grid, spec.a_bits, linear.bias.detach() if bias else None
    )
    return layer, linear


@pytest.mark.parametrize("notation", ["w4a16", "w3a16g32", "w2*a16"])
def test_full_precision_activations_meet_the_dequantized_weight(notation):
    layer, linear = layer_of(notation)
    x = torch.randn(2, 3, 96)

    expected = nn.functional.linear(x, layer.dequantized(), linear.bias)

    assert torch.equal(layer.prepare()(x), expected)


@pytest.mark.parametrize("notation", ["w8a8", "w8a8g32"])
def test_eight_bits_come_close_to_the_float_layer(notation):
    layer, linear = layer_of(notation)
    x = torch.randn(4, 96)

    torch.testing.assert_close(layer.prepare()(x), linear(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("notation", ["w4a8", "w4a16", "w8a4g32"])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (0, 96)])
def test_any_leading_shape_is_kept(notation, shape):
    layer, _ = layer_of(notation)

    assert layer.prepare()(torch.randn(shape)).shape == (*shape[:-1], 20)


@pytest.mark.parametrize("notation", ["w4a8", "w3a6", "w2*a8", "w1*a4", "w8a8", "w5a2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (0, 96)])
def test_slices_for_a_gpu_give_the_bits_of_the_processor(notation, dtype, shape):
    layer, _ = layer_of(notation)
    x = torch.randn(shape, dtype=dtype)

    found = multiply(x, layer.sliced(), layer.a_bits, layer.bias)

    assert torch.equal(found, layer.prepare()(x))


@pytest.mark.parametrize("notation", ["w4a8g32", "w2a4g32", "w8a8g32"])
def test_slices_in_groups_differ_by_the_order_of_a_sum_at_most(notation):
    layer, _ = layer_of(notation)
    x = torch.randn(4, 96)

    found = multiply(x, layer.sliced(), layer.a_bits, layer.bias)

    torch.testing.assert_close(found, layer.prepare()(x), rtol=1e-5, atol=1e-5)


def test_everything_that_slices_keep_is_counted():
    sliced = layer_of("w2a8g64", features=(128, 64))[0].sliced()
    per_group = 2 + 4 + 1 + 4  # scale, zero-point, its code, code sum

    kept = 64 * 256 * 2 // 8 + 64 * 2 * per_group + 64 * 4 + sum(
        each.nbytes for each in (sliced.group_rows.rows, sliced.group_rows.terms)
    )  # fmt: skip
    assert operand_bytes(sliced) == kept


def test_slices_on_a_half_step_grid_need_no_doubled_codes():
    spec = QuantSpec(w_bits=2, a_bits=8, half_step=True)
    twin = FakeQuantLinear(nn.Linear(96, 20), spec.weight_grid("any"), 8)
    layer, x = twin.to_quant_linear(), torch.randn(4, 96)

    sliced = layer.sliced()

    assert sliced.field_bits == (2,)
    found = multiply(x, sliced, 8, layer.bias)
    torch.testing.assert_close(found, layer.prepare()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "groups", "fits"),
    [
        (4096, 1, True),
        (4096, 32, True),
        (96, 1, True),
        (192, 2, False),
        (512, 2, False),
        (40000, 1, False),
    ],
)
def test_the_fast_kernels_take_whole_rows_and_the_usual_groups(columns, groups, fits):
    assert can_multiply(columns, groups) == fits


def test_an_unprepared_layer_computes_the_same():
    layer, _ = layer_of("w4a8g32")
    x = torch.randn(5, 96)

    assert torch.equal(layer(x), layer.prepare()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_input(dtype):
    layer, _ = layer_of("w4a8")

    assert layer.prepare()(torch.randn(2, 96).to(dtype)).dtype == dtype


def test_the_state_is_what_a_checkpoint_stores():
    layer, _ = layer_of("w3a8g32")

    state = layer.prepare().state_dict()

    assert {name: (str(each.dtype), tuple(each.shape)) for name, each in state.items()} == {
        "weight_packed": ("torch.int32", (3, 20, 3)),
        "weight_scale": ("torch.float16", (20, 3)),
        "weight_zero_point": ("torch.uint8", (20, 3)),
        "bias": ("torch.float32", (20,)),
    }


def test_a_layer_without_bias_stores_none():
    layer, _ = layer_of("w4a8", bias=False)

    assert "bias" not in layer.state_dict()


def test_an_empty_layer_takes_a_state_and_computes_the_same():
    layer, _ = layer_of("w4a8")
    with torch.device("meta"):
        empty = QuantLinear.empty(nn.Linear(96, 20), layer.grid, 8)
    x = torch.randn(3, 96)

    empty.load_state_dict(layer.state_dict(), assign=True)

    assert torch.equal(empty.prepare()(x), layer(x))


def test_changing_the_dtype_of_a_model_leaves_the_stored_scale_alone():
    layer, _ = layer_of("w4a8")
    before = layer.weight_scale.clone()

    layer.to(torch.bfloat16)

    assert layer.weight_scale.dtype == torch.float16
    assert torch.equal(layer.weight_scale, before)
    assert layer.bias.dtype == torch.bfloat16


def test_moving_a_layer_drops_what_was_derived_from_old_buffers():
    layer, _ = layer_of("w4a8")
    assert layer.prepare().operand_bytes == 96 * 20

    layer.to("cpu")

    assert layer.operand_bytes == 0


def test_the_twin_in_evaluation_is_bit_equal_to_the_packed_layer():
    grid = QuantSpec.from_notation("w3a8g32").weight_grid("any")
    twin = FakeQuantLinear(nn.Linear(96, 20), grid, 8).eval()
    x = torch.randn(2, 7, 96)

    assert torch.equal(twin(x), twin.to_quant_linear().prepare()(x))


@pytest.mark.parametrize("notation", ["w4a8", "w2*a8g32", "w4a16"])
def test_the_twin_in_training_agrees_with_its_evaluation(notation):
    spec = QuantSpec.from_notation(notation)
    twin = FakeQuantLinear(nn.Linear(96, 20), spec.weight_grid("any"), spec.a_bits)
    x = torch.randn(4, 96)

    torch.testing.assert_close(twin.train()(x), twin.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_twin_in_training_differs_from_the_float_layer():
    linear = nn.Linear(96, 20)
    twin = FakeQuantLinear(linear, QuantSpec.from_notation("w2a4").weight_grid("any"), 4)
    x = torch.randn(4, 96)

    assert (twin.train()(x) - linear(x)).abs().max() > 0.05


class Halving(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, limits):
        return type(limits)(low=limits.low * self.factor, high=limits.high * self.factor)


def test_a_clip_module_is_trained_and_stored_with_its_twin():
    grid = QuantSpec.from_notation("w2a8").weight_grid("any")
    twin = FakeQuantLinear.clipped(nn.Linear(96, 20), grid, 8, Halving())
    plain = FakeQuantLinear(nn.Linear(96, 20), grid, 8)
    plain.weight = twin.weight

    twin.train()(torch.randn(4, 96)).sum().backward()

    assert "clip.factor" in dict(twin.named_parameters())
    assert float(twin.clip.factor.grad.abs()) > 0
    torch.testing.assert_close(
        twin.params().scale.float(), plain.params().scale.float() / 2, rtol=2e-3, atol=0
    )
    assert torch.equal(twin.to_quant_linear().weight_scale, twin.params().scale)


def model_of_three():
    return nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 64), nn.ReLU()))


def test_only_the_layers_that_are_answered_with_a_new_one_are_swapped():
    model = model_of_three()
    grid = QuantSpec.from_notation("w4a8").weight_grid("any")

    swapped = swap_linears(
        model, lambda name, linear: FakeQuantLinear(linear, grid, 8) if name == "1.0" else None
    )

    assert swapped == ["1.0"]
    assert list(named_linears(model)) == ["0"]


def test_preparing_a_model_prepares_every_packed_layer():
    model = model_of_three()
    grid = QuantSpec.from_notation("w4a8").weight_grid("any")
    swap_modules(
        model,
        {
            name: FakeQuantLinear(each, grid, 8).to_quant_linear()
            for name, each in named_linears(model).items()
        },
    )

    prepare_model(model)

    assert [each.operand_bytes for each in quant_linears(model).values()] == [1024, 2048]


def transformed_layer(notation, block, features=(96, 20)):
    linear = nn.Linear(*features)
    spec = QuantSpec.from_notation(notation)
    return FakeQuantLinear(linear, spec.weight_grid("any"), spec.a_bits, block), linear


@pytest.mark.parametrize(("notation", "tolerance"), [("w8a16", 0.02), ("w8a8", 0.05)])
@pytest.mark.parametrize("block", [96, 48, 32])
def test_a_transform_of_the_inputs_leaves_the_function(notation, tolerance, block):
    twin, linear = transformed_layer(notation, block)
    layer = twin.to_quant_linear().prepare()
    x = torch.randn(3, 5, 96)

    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=tolerance)
    assert layer.input_hadamard == block
    # the codes are those of other columns
    assert not torch.allclose(layer.dequantized(), linear.weight, atol=0.05)


@pytest.mark.parametrize("notation", ["w4a8", "w3a16", "w2*a6"])
def test_a_transforming_twin_computes_what_its_packed_layer_does(notation):
    twin, _ = transformed_layer(notation, 96)
    x = torch.randn(3, 96)

    exact = twin.eval()(x)

    assert torch.equal(twin.to_quant_linear()(x), exact)
    torch.testing.assert_close(twin.train()(x), exact, rtol=0, atol=1e-4)


def test_a_transform_adds_no_tensor_to_the_checkpoint():
    twin, _ = transformed_layer("w4a8", 96)

    stored = twin.to_quant_linear().state_dict()

    assert stored.keys() == {"weight_packed", "weight_scale", "weight_zero_point", "bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_mixed_before_they_are_rounded(dtype):
    twin, _ = transformed_layer("w4a8", 96)
    layer = twin.to_quant_linear()
    x = torch.randn(3, 96).to(dtype)

    out = layer(x)

    assert out.dtype == dtype
    assert torch.equal(out, layer(x.float()).to(dtype))


def test_a_transform_keeps_four_bit_activations_with_an_outlier_exact():
    x = torch.randn(64, 96)
    x[:, 5] *= 50
    plain, linear = transformed_layer("w8a4", 0)
    mixed = FakeQuantLinear(linear, plain.grid, 4, 96)

    def error(layer):
        return float((layer.to_quant_linear()(x) - linear(x).detach()).square().mean())

    assert error(mixed) < error(plain) / 4


def test_an_empty_layer_on_the_meta_device_has_a_real_transform():
    with torch.device("meta"):
        linear = nn.Linear(96, 20)

    empty = QuantLinear.empty(linear, QuantSpec(w_bits=4).weight_grid("any"), 8, 96)

    assert {each.device.type for each in empty.transform.buffers()} == {"cpu"}
    assert empty.weight_packed.is_meta
