"""Random operands of a case, copies of them, and what a right output is.

A right output of an integer product is the one that int64 gives: with a scale a row, bit for bit
after the same three roundings; with scales of groups, within the float32 rounding of their sum. On
a GPU, where torch has no int64 product, float64 gives the same integers: all stay below 2^53.

Shape legend: M tokens, N outputs, K inputs, G inputs in a group, S groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from benchmarks.kernel_case import HALF_BITS, KernelCase
from kernels.activation_quant import QuantizedActivations
from kernels.layouts import packed_words, unpack_codes
from kernels.sliced import SlicedWeight, slice_weight
from kernels.tokens import TokenCodes

__all__ = ["Operands", "copy_tensors", "draw_operands", "make_check", "tensor_bytes"]

T = TypeVar("T")

ROWS = 4096
"""Weight rows of the exact product at a time: 4096 x 28672 are 0.9 GB of float64."""
DEVIATIONS = 8
"""Of a weight's rounding to 16 bits, summed over K: beyond them lies no one of 10^12 outputs."""
FLOAT32_SUM = 2.0**-18
"""Of the sum of magnitudes, for float32 sums on tensor cores, which truncate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """What a product takes, and what it was made of."""

    case: KernelCase
    planes: torch.Tensor
    """int32 ``[P, N, W]``."""
    scale: torch.Tensor
    """float16 ``[N, S]``."""
    zero_point: torch.Tensor
    """uint8 ``[N, S]``."""
    weight: SlicedWeight
    activations: QuantizedActivations | None
    """None with 16-bit activations."""
    tokens: TokenCodes | None
    x: torch.Tensor | None
    """bfloat16 ``[M, K]``, None with quantized activations."""

    def dequantized(self, rows: slice = slice(None)) -> torch.Tensor:
        """The float64 ``[N, K]`` that rows of the weight stand for."""
        codes_NK = unpack_codes(self.planes[:, rows], self.case.k).double()
        zero_NK = _per_column(self.zero_point[rows].double(), codes_NK)
        return (codes_NK - zero_NK) * _per_column(self.scale[rows].double(), codes_NK)


def draw_operands(case: KernelCase, device: torch.device) -> Operands:
    """Draw codes, scales and zero-points anew, none of them special."""
    n, k, m, groups = case.n, case.k, case.m, case.groups
    shape = (case.w_bits, n, packed_words(k))
    planes = torch.randint(-(1 << 31), 1 << 31, shape, device=device).to(torch.int32)
    scale = torch.rand(n, groups, device=device).add_(0.5).mul_(2.0**-7).half()
    zero_point = torch.randint(0, 1 << case.w_bits, (n, groups), device=device).to(torch.uint8)
    weight = slice_weight(planes, scale, zero_point, k)
    activations = tokens = x = None
    if case.a_bits == HALF_BITS:
        x = torch.randn(m, k, device=device).bfloat16()
    else:
        codes = torch.randint(0, 1 << case.a_bits, (m, k), device=device, dtype=torch.uint8)
        zero = torch.randint(0, 1 << case.a_bits, (m, 1), device=device, dtype=torch.int32)
        activations = QuantizedActivations(
            codes=codes,
            scale=torch.rand(m, 1, device=device).add_(0.5).mul_(2.0**-6),
            zero_point=zero,
            bits=case.a_bits,
        )
        tokens = TokenCodes.from_activations(activations, groups=groups, columns=weight.columns)
    return Operands(
        case=case, planes=planes, scale=scale, zero_point=zero_point, weight=weight,
        activations=activations, tokens=tokens, x=x,
    )  # fmt: skip


def copy_tensors(value: T) -> T:
    """Copy a frozen dataclass with fresh tensors, also those in tuples."""
    return replace(value, **{  # type: ignore[type-var]  # any dataclass
        each.name: _copy(getattr(value, each.name))
        for each in fields(value)  # type: ignore[arg-type]  # any dataclass
    })  # fmt: skip


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors of a frozen dataclass, also of those in tuples."""
    flat = [getattr(value, each.name) for each in fields(value)]
    flat += [part for each in flat if isinstance(each, tuple) for part in each]
    return sum(each.nbytes for each in flat if isinstance(each, torch.Tensor))


def make_check(operands: Operands, dtype: torch.dtype) -> Callable[[torch.Tensor], bool]:
    """Compute the product once and hold outputs of that dtype to it."""
    half = operands.x is not None
    parts = [
        (_half_bounds if half else _integer_bounds)(operands, slice(start, start + ROWS), dtype)
        for start in range(0, operands.case.n, ROWS)
    ]
    low = torch.cat([part[0] for part in parts], dim=1)
    high = torch.cat([part[1] for part in parts], dim=1)

    def check(output: torch.Tensor) -> bool:
        # NaN is not between any two numbers, so what nobody wrote is wrong
        fits = output.dtype == dtype and output.shape == low.shape
        return fits and bool(((low <= output) & (output <= high)).all())

    return check


def _integer_bounds(
    operands: Operands, rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    case, activations = operands.case, operands.activations
    assert activations is not None
    exact = torch.int64 if operands.planes.device.type == "cpu" else torch.float64
    u_MSG = (activations.codes.to(exact) - activations.zero_point).view(case.m, case.groups, -1)
    w_NSG = _centred(operands, rows).view(-1, case.groups, u_MSG.shape[2]).to(exact)
    scale_NS = operands.scale[rows]
    single = torch.zeros(case.m, w_NSG.shape[0], device=u_MSG.device)
    double = torch.zeros_like(single, dtype=torch.float64)
    size = torch.zeros_like(double)
    for g in range(case.groups):
        integer_MN = u_MSG[:, g] @ w_NSG[:, g].t()
        single = integer_MN.float() * scale_NS[:, g].float()
        term_MN = integer_MN.double() * scale_NS[:, g].double()
        double += term_MN
        size += term_MN.abs()
    if case.groups == 1:
        only = (single * activations.scale).to(dtype)
        return only, only
    # the pipelined kernel shifts sums by what none of them passes, up and down in turn
    reach = 256 * (1 << case.w_bits) * u_MSG.shape[2]
    signs_S = 1 - 2 * (torch.arange(case.groups, device=size.device) % 2)
    size += reach * (scale_NS.double() * signs_S).cumsum(1).abs().amax(1)
    slack = size * activations.scale * (2 * case.groups + 2) * 2.0**-24
    return _round_outwards(double * activations.scale, slack, dtype)


def _half_bounds(
    operands: Operands, rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    assert operands.x is not None
    x_MK = operands.x.double()
    w_NK = operands.dequantized(rows)
    rounding = torch.finfo(operands.x.dtype).eps / 2 / math.sqrt(3)
    slack = (x_MK.square() @ w_NK.square().t()).sqrt() * (DEVIATIONS * rounding)
    # a zero-point may be subtracted from the sum instead of from every code
    largest_NS = operands.scale[rows].double() * (1 << operands.case.w_bits)
    slack += x_MK.abs() @ _per_column(largest_NS, w_NK).t() * FLOAT32_SUM
    return _round_outwards(x_MK @ w_NK.t(), slack, dtype)


def _round_outwards(
    value: torch.Tensor, slack: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    # rounding to the dtype keeps order, so it may be applied to both ends
    return (value - slack).to(dtype), (value + slack).to(dtype)


def _centred(operands: Operands, rows: slice) -> torch.Tensor:
    """int16 ``[N, K]`` codes less their zero-points."""
    codes_NK = unpack_codes(operands.planes[:, rows], operands.case.k).to(torch.int16)
    return codes_NK - _per_column(operands.zero_point[rows].to(torch.int16), codes_NK)


def _per_column(value_NS: torch.Tensor, like_NK: torch.Tensor) -> torch.Tensor:
    return value_NS.repeat_interleave(like_NK.shape[1] // value_NS.shape[1], dim=1)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copy(each) for each in value)
    return copy_tensors(value) if is_dataclass(value) else value
