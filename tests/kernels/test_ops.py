import pytest
import torch

from kernels import ops
from kernels.activation_quant import quantize_activations
from kernels.layouts import pack_codes
from kernels.sliced import slice_weight
from kernels.sliced_reference import sliced_linear_reference
from kernels.tokens import TokenCodes

WIDTHS = [(1, 1), (3, 1), (4, 3), (7, 1), (8, 1)]


def weight_of(bits, n=10, k=96, groups=1, half_step=False):
    return slice_weight(
        pack_codes(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits),
        torch.rand(n, groups).add(0.1).half(),
        torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8),
        k,
        half_step=half_step,
    )


def expected(x, weight, bias=None, a_bits=8):
    tokens = TokenCodes.from_activations(
        quantize_activations(x.reshape(-1, x.shape[-1]), a_bits),
        groups=weight.groups,
        columns=weight.columns,
    )
    out = sliced_linear_reference(tokens, weight, bias, out_dtype=x.dtype)
    return out.view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("bits", "groups"), WIDTHS)
@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 3, 96)])
def test_the_joint_operator_is_quantization_and_product(bits, groups, shape):
    x, weight, bias = torch.randn(shape), weight_of(bits, groups=groups), torch.randn(10)

    out = ops.quantized_linear(x, weight, bias, a_bits=6)

    assert out.shape == (*shape[:-1], 10)
    assert torch.equal(out, expected(x, weight, bias, a_bits=6))


def test_a_weight_comes_back_with_the_rows_of_its_groups():
    weight = weight_of(3, k=256, groups=2)

    back = ops._weight_of(ops._tensors_of(weight), ops._numbers_of(weight))  # noqa: SLF001  the operand form

    assert torch.equal(back.group_rows.rows, weight.group_rows.rows)
    assert torch.equal(back.group_rows.terms, weight.group_rows.terms)
    assert back.group_rows.bound == weight.group_rows.bound
    assert back.field_bits == weight.field_bits
    assert all(map(torch.equal, back.fields, weight.fields))


def test_both_operators_in_turn_give_the_same():
    x, weight = torch.randn(5, 96).bfloat16(), weight_of(2, half_step=True)

    tokens = ops.quantize_tokens(x, 8, weight)
    out = ops.integer_linear(tokens, weight, out_dtype=torch.bfloat16)

    assert torch.equal(out, ops.quantized_linear(x, weight))
    assert torch.equal(out, expected(x, weight))


def test_features_that_lie_apart_are_brought_together(monkeypatch):
    x, weight = torch.randn(96, 3).t(), weight_of(4)
    seen = []
    reference = ops.code_tokens
    monkeypatch.setattr(ops, "code_tokens", lambda x, form: seen.append(x) or reference(x, form))

    tokens = ops.quantize_tokens(x, 8, weight)

    assert [each.stride() for each in seen] == [(96, 1)]
    assert torch.equal(tokens.codes, ops.quantize_tokens(x.contiguous(), 8, weight).codes)


@pytest.mark.parametrize(("bits", "groups"), WIDTHS)
def test_operators_are_well_formed(bits, groups):
    x, weight = torch.randn(3, 96), weight_of(bits, groups=groups)
    tokens = ops.quantize_tokens(x, 8, weight)
    parts = [tokens.codes, tokens.scale, tokens.zero_point, tokens.sums]
    w, numbers = ops._tensors_of(weight), ops._numbers_of(weight)  # noqa: SLF001  the operand form

    opcheck = torch.library.opcheck
    opcheck(torch.ops.abq.quantize_tokens.default, (x, 8, groups, weight.columns))
    opcheck(torch.ops.abq.integer_linear.default, (parts, 8, w, numbers, None, torch.float16))
    opcheck(torch.ops.abq.quantized_linear.default, (x, 8, w, numbers, torch.randn(10)))


def test_a_whole_graph_is_compiled_without_a_break_and_for_any_number_of_tokens():
    weight, other = weight_of(3, n=96), weight_of(4, n=10)

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def layer(x):
        hidden = ops.quantized_linear(x, weight)
        tokens = ops.quantize_tokens(torch.relu(hidden), 8, other)
        return ops.integer_linear(tokens, other, out_dtype=x.dtype)

    for m in (4, 7):
        x = torch.randn(m, 96)
        hidden = torch.relu(expected(x, weight))

        assert torch.equal(layer(x), expected(hidden, other))


def test_fake_tensors_know_shapes_without_running():
    weight = weight_of(4, groups=3)

    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):  # noqa: SLF001  its only name
        x = torch.empty(7, 2, 96, dtype=torch.float16)
        tokens = ops.quantize_tokens(x, 4, weight)
        out = ops.quantized_linear(x, weight)

    assert (out.shape, out.dtype) == ((7, 2, 10), torch.float16)
    assert (tokens.codes.shape, tokens.codes.dtype) == ((14, weight.columns), torch.int8)
    assert (tokens.sums.shape, tokens.sums.dtype) == ((14, 3), torch.int32)
