"""The products as `torch.library` operators, for torch.compile, CUDA graphs and other engines.

    abq::quantize_tokens     float tokens -> codes, scale, zero-point, code sums
    abq::integer_linear      those and a sliced weight -> outputs
    abq::quantized_linear    both at once, as one node of a graph

An operator takes tensors and numbers only, so dataclasses are taken apart at its door and put
together behind it. Each has a fake implementation, which knows shapes and dtypes without running,
and answers on a CPU in plain torch.

Shape legend: M tokens, N outputs, K inputs, L >= K columns, S groups.
"""

from collections.abc import Sequence

import torch

from kernels import linear
from kernels.group_rows import GroupRows
from kernels.quantize_tokens import TokenForm, code_tokens
from kernels.sliced import SlicedWeight
from kernels.tokens import TokenCodes

__all__ = ["integer_linear", "quantize_tokens", "quantized_linear"]

OUT_FEATURES = 1
"""Where `_numbers_of` puts N."""
Tensors = Sequence[torch.Tensor]


def quantize_tokens(x: torch.Tensor, bits: int, weight: SlicedWeight) -> TokenCodes:
    """Quantize tokens for a weight.

    Args:
        x: float ``[..., K]``; leading dimensions become M tokens.
        bits: 2..8.
        weight: tells columns and groups.
    """
    parts = torch.ops.abq.quantize_tokens(
        x.reshape(-1, x.shape[-1]), bits, weight.groups, weight.columns
    )
    return _tokens_of(parts, bits)


def integer_linear(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Call `kernels.linear.integer_linear` as an operator."""
    parts = [tokens.codes, tokens.scale, tokens.zero_point, tokens.sums]
    out: torch.Tensor = torch.ops.abq.integer_linear(
        parts, tokens.bits, _tensors_of(weight), _numbers_of(weight), bias, out_dtype
    )
    return out


def quantized_linear(
    x: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None = None, *, a_bits: int = 8
) -> torch.Tensor:
    """Quantize tokens and multiply them.

    Args:
        x: float ``[..., K]``.
        weight: N outputs.
        bias: float ``[N]`` or None.
        a_bits: 2..8.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    out: torch.Tensor = torch.ops.abq.quantized_linear(
        x, a_bits, _tensors_of(weight), _numbers_of(weight), bias
    )
    return out


@torch.library.custom_op("abq::quantize_tokens", mutates_args=())
def _quantize_tokens(
    x: torch.Tensor, bits: int, groups: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # a view of leading dimensions may leave features apart, which the kernel does not read
    tokens = code_tokens(x.contiguous(), TokenForm(bits=bits, groups=groups, columns=columns))
    return tokens.codes, tokens.scale, tokens.zero_point, tokens.sums


@_quantize_tokens.register_fake
def _(
    x: torch.Tensor, _bits: int, groups: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    m = x.shape[0]
    return (
        x.new_empty((m, columns), dtype=torch.int8),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((m,), dtype=torch.int32),
        x.new_empty((m, groups), dtype=torch.int32),
    )


@torch.library.custom_op("abq::integer_linear", mutates_args=())
def _integer_linear(
    tokens: Sequence[torch.Tensor],
    bits: int,
    weight: Sequence[torch.Tensor],
    numbers: Sequence[int],
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return linear.integer_linear(
        _tokens_of(tokens, bits), _weight_of(weight, numbers), bias, out_dtype=out_dtype
    )


@_integer_linear.register_fake
def _(
    tokens: Tensors,
    _bits: int,
    _weight: Tensors,
    numbers: Sequence[int],
    _bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    codes = tokens[0]
    return codes.new_empty((codes.shape[0], numbers[OUT_FEATURES]), dtype=out_dtype)


@torch.library.custom_op("abq::quantized_linear", mutates_args=())
def _quantized_linear(
    x: torch.Tensor,
    a_bits: int,
    weight: Sequence[torch.Tensor],
    numbers: Sequence[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    sliced = _weight_of(weight, numbers)
    return linear.quantized_linear(x, sliced, bias, a_bits=a_bits)


@_quantized_linear.register_fake
def _(
    x: torch.Tensor,
    _a_bits: int,
    _weight: Tensors,
    numbers: Sequence[int],
    _bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], numbers[OUT_FEATURES]))


def _tokens_of(parts: Tensors, bits: int) -> TokenCodes:
    codes, scale, zero_point, sums = parts
    return TokenCodes(codes=codes, scale=scale, zero_point=zero_point, sums=sums, bits=bits)


def _tensors_of(weight: SlicedWeight) -> list[torch.Tensor]:
    per_row = [weight.scale, weight.zero_point, weight.zero_codes, weight.sums, weight.terms]
    rows = weight.group_rows
    return [*per_row, *weight.fields, *([rows.rows, rows.terms] if rows else [])]


def _numbers_of(weight: SlicedWeight) -> list[int]:
    sizes = [weight.in_features, weight.out_features, weight.columns, weight.bits]
    bound = weight.group_rows.bound if weight.group_rows else 0
    return [*sizes, weight.multiplier, bound, *weight.field_bits]


def _weight_of(tensors: Tensors, numbers: Sequence[int]) -> SlicedWeight:
    scale, zero_point, zero_codes, sums, terms, *fields = tensors
    in_features, out_features, columns, bits, multiplier, bound, *field_bits = numbers
    group_rows = None
    if bound:
        *fields, rows, row_terms = fields
        group_rows = GroupRows(rows=rows, terms=row_terms, bound=bound)
    return SlicedWeight(
        fields=tuple(fields),
        field_bits=tuple(field_bits),
        scale=scale,
        zero_point=zero_point,
        zero_codes=zero_codes,
        sums=sums,
        terms=terms,
        in_features=in_features,
        out_features=out_features,
        columns=columns,
        bits=bits,
        multiplier=multiplier,
        group_rows=group_rows,
    )
