"""What a device multiplies with, derived from codes: the exact product of a quantized layer.

Shape legend: N outputs, K inputs, S groups in a row.
"""

import torch

from engine.numerics.affine import AffineParams, dequantize_weight, doubled_codes
from engine.spec import FULL_BITS
from kernels.activation_quant import quantize_activations
from kernels.cpu_linear import CpuWeight, cpu_linear, prepare_cpu_weight
from kernels.float_linear import float_linear
from kernels.int_linear import PackedWeight, integer_linear
from kernels.layouts import pack_codes
from kernels.linear import quantized_linear
from kernels.sliced import SlicedWeight

__all__ = [
    "Operand",
    "derive_operand",
    "multiply",
    "multiply_codes",
    "operand_bytes",
    "pack_operand",
]

Operand = CpuWeight | PackedWeight | SlicedWeight | torch.Tensor
"""A tensor is a float weight ``[N, K]``."""
BYTE_PLANES = 8


def multiply_codes(
    x: torch.Tensor,
    codes_NK: torch.Tensor,  # noqa: N803  shape suffix
    params: AffineParams,
    a_bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute what `QuantLinear` computes, from codes that are not packed yet.

    Args:
        x: float ``[..., K]``.
        codes_NK: uint8 ``[N, K]``.
        params: where the codes lie.
        a_bits: bits of the activations; 16 leaves them as they are.
        bias: float ``[N]`` or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    if codes_NK.device.type == "cpu" or a_bits == FULL_BITS:
        return multiply(x, derive_operand(codes_NK, params, a_bits), a_bits, bias)
    return multiply(x, pack_operand(codes_NK, params), a_bits, bias)


def pack_operand(
    codes_NK: torch.Tensor,  # noqa: N803  shape suffix
    params: AffineParams,
) -> PackedWeight:
    """Pack uint8 ``[N, K]`` codes for a GPU; a half-step grid is written with doubled codes."""
    if params.half_step:
        codes_NK, params = doubled_codes(codes_NK, params)  # noqa: N806  shape suffix
    return PackedWeight.from_stored(
        pack_codes(codes_NK, BYTE_PLANES), params.scale, params.zero_point, codes_NK.shape[1]
    )


def derive_operand(
    codes_NK: torch.Tensor,  # noqa: N803  shape suffix
    params: AffineParams,
    a_bits: int,
) -> CpuWeight | torch.Tensor:
    """Derive int8 columns for a CPU, or a float weight where inputs stay in full precision."""
    if a_bits == FULL_BITS:
        return dequantize_weight(codes_NK, params)
    if params.half_step:
        codes_NK, params = doubled_codes(codes_NK, params)  # noqa: N806  shape suffix
    return prepare_cpu_weight(codes_NK, params.scale, params.zero_point)


def multiply(
    x: torch.Tensor, operand: Operand, a_bits: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply float ``[..., K]``, rounded to `a_bits`, by an operand; the dtype of ``x``."""
    if isinstance(operand, torch.Tensor):
        return float_linear(x, operand, bias)
    if isinstance(operand, SlicedWeight):
        return quantized_linear(x, operand, bias, a_bits=a_bits)
    tokens = quantize_activations(x.reshape(-1, x.shape[-1]), a_bits)
    if isinstance(operand, CpuWeight):
        out_MN = cpu_linear(tokens, operand, bias)  # noqa: N806  shape suffix
    else:
        out_MN = integer_linear(tokens, operand, bias)  # noqa: N806  shape suffix
    return out_MN.to(x.dtype).view(*x.shape[:-1], out_MN.shape[1])


def operand_bytes(operand: Operand) -> int:
    """Bytes of what was derived beside a checkpoint's buffers; packed planes are those buffers."""
    match operand:
        case torch.Tensor() | SlicedWeight():
            return operand.nbytes
        case CpuWeight():
            return sum(each.nbytes for each in operand.columns)
        case _:
            return 0
