"""The one hop from (weight bits, activation bits, tokens) to the kernel that answers.

    tokens                      kernel                         file
    few, by weight bits         dp4a product of rows           `kernels.decode_linear`
    more                        int8 tensor cores              `kernels.tile_linear`
    any, where tuning says so   binary tensor cores            `kernels.binary_linear`
    on a CPU                    plain torch                    here

A table of the GPU says which and with which configuration (`kernels.tables`); without one the
default of this module chooses the kernel, and the kernel its own configuration. All of them
compute `kernels.int_linear`'s Y, and with a scale a row the same bits.

Shape legend: M tokens, N outputs, K inputs, S = K / G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kernels import decode_linear, tile_config, tile_linear
from kernels.sliced import SlicedWeight, unslice_codes
from kernels.tables import WHOLE_ROW, ConfigTable, Route, TableKey, load_table
from kernels.tokens import BYTE_BITS, BYTE_SHIFT, TokenCodes

__all__ = [
    "Plan",
    "integer_linear",
    "integer_linear_reference",
    "key_of",
    "launch_plan",
    "plan_linear",
]

FLOAT32_EXACT = 1 << 24
DECODE_TOKENS: Mapping[int, int] = {1: 2, 2: 4, 3: 3}
"""Most tokens for dp4a without a table, by weight bits: its instructions fit the memory's time."""
MOST_DECODE_TOKENS = 8
LAUNCHERS: Mapping[Route, Callable[..., torch.Tensor]] = {
    Route.DECODE: decode_linear.decode_linear,
    Route.TILE: tile_linear.tile_linear,
}
CONFIGS: Mapping[Route, Callable[..., Any]] = {
    Route.DECODE: decode_linear.LaunchConfig,
    Route.TILE: tile_config.LaunchConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which kernel answers, and how it is launched."""

    route: Route
    config: Any
    """The route's own launch configuration; None leaves it to the kernel."""


def integer_linear(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply quantized tokens by a sliced weight with the fastest kernel known for the shape.

    Args:
        tokens: M tokens of L codes with a sum for each of the weight's groups.
        weight: N outputs of L columns.
        bias: float ``[N]`` or None.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        ``[M, N]`` of that dtype.

    Raises:
        ValueError: if tokens and weight do not fit each other.
    """
    _check_operands(tokens, weight)
    device = tokens.codes.device
    if device.type == "cpu":
        return integer_linear_reference(tokens, weight, bias, out_dtype=out_dtype)
    m = tokens.codes.shape[0]
    plan = plan_linear(key_of(weight, m=m, a_bits=tokens.bits), _table_of(device.index or 0))
    return launch_plan(plan, tokens, weight, bias, out_dtype=out_dtype)


def key_of(weight: SlicedWeight, *, m: int, a_bits: int) -> TableKey:
    """Where a table has the product of M tokens and a weight."""
    group = WHOLE_ROW if weight.groups == 1 else weight.group_size
    return TableKey.of(
        a_bits=a_bits, w_bits=weight.bits, group=group,
        n=weight.out_features, k=weight.in_features, m=m,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def plan_linear(key: TableKey, table: ConfigTable) -> Plan:
    """Choose by the table, else by the number of tokens."""
    entry = table.lookup(key)
    if entry is not None and entry.route in CONFIGS:
        return Plan(route=entry.route, config=CONFIGS[entry.route](**entry.config))
    few = key.m <= DECODE_TOKENS.get(key.w_bits, MOST_DECODE_TOKENS)
    return Plan(route=Route.DECODE if few else Route.TILE, config=None)


def launch_plan(
    plan: Plan,
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Run the kernel of a plan, on a GPU or in the interpreter; see `integer_linear`."""
    launch = LAUNCHERS[plan.route]
    return launch(tokens, weight, bias, out_dtype=out_dtype, config=plan.config)


def integer_linear_reference(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Compute `integer_linear` in plain torch on any device: exact integers, the same roundings."""
    m, n, k = tokens.codes.shape[0], weight.out_features, weight.in_features
    groups, group = weight.groups, weight.group_size
    x_MSG = (tokens.codes[:, :k].int() - tokens.zero_point[:, None]).view(m, groups, group)
    shift = BYTE_SHIFT if weight.bits == BYTE_BITS else 0
    codes_NSG = unslice_codes(weight).int().sub_(shift).view(n, groups, group)
    w_NSG = codes_NSG * weight.multiplier - weight.zero_point[:n, :, None]
    # a token's zero-point is a code itself
    bound = group * ((1 << tokens.bits) - 1) * int(w_NSG.abs().amax())
    exact = torch.float32 if bound < FLOAT32_EXACT else torch.float64
    out_MN = torch.zeros(m, n, device=x_MSG.device)
    for g in range(groups):
        integer_MN = x_MSG[:, g].to(exact) @ w_NSG[:, g].to(exact).t()
        out_MN += integer_MN.float() * weight.scale[:n, g].float()
    out_MN *= tokens.scale[:, None]
    if bias is not None:
        out_MN += bias.float()
    return out_MN.to(out_dtype)


@lru_cache(maxsize=16)
def _table_of(device_index: int) -> ConfigTable:
    return load_table(torch.cuda.get_device_name(device_index))


def _check_operands(tokens: TokenCodes, weight: SlicedWeight) -> None:
    if tokens.codes.shape[1] != weight.columns:
        raise ValueError(
            f"tokens have {tokens.codes.shape[1]} columns, the weight {weight.columns}"
        )
    if tokens.sums.shape[1] != weight.groups:
        raise ValueError(
            f"tokens have sums of {tokens.sums.shape[1]} groups, the weight {weight.groups}"
        )
    if tokens.codes.device != weight.scale.device:
        raise ValueError(
            f"tokens are on {tokens.codes.device}, the weight on {weight.scale.device}"
        )
