"""The one hop from (weight bits, activation bits, tokens) to the kernel that answers.

    tokens                      kernel                         file
    few, by weight bits         dp4a product of rows           `kernels/decode_linear.py`
    more                        int8 tensor cores              `kernels/tile_linear.py`
    where bits are few          binary tensor cores            `kernels/binary_linear.py`
    on a CPU                    plain torch                    `kernels/sliced_reference.py`

A table of the GPU says which and with which configuration (`kernels.tables`); without one the
default of this module chooses the kernel, and the kernel its own configuration. All compute
the Y of `kernels.int_linear`, and with a scale a row the same bits.

Shape legend: M tokens, N outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from kernels import binary_linear, decode_config, decode_linear, tile_config, tile_linear
from kernels.fragments import ColumnOrder, FragmentTokens, FragmentWeight
from kernels.sliced import SlicedWeight
from kernels.sliced_reference import sliced_linear_reference
from kernels.tables import (
    BUCKETS,
    WHOLE_ROW,
    ConfigTable,
    InvalidTableError,
    Route,
    TableKey,
    load_table,
)
from kernels.token_fragments import pack_token_fragments
from kernels.tokens import TokenCodes

__all__ = [
    "Plan",
    "column_order",
    "integer_linear",
    "key_of",
    "launch_binary",
    "launch_plan",
    "make_counters",
    "plan_linear",
    "wants_fragments",
]

MOST_TILES = 1 << 16
"""Of any product: 57344 rows in tiles of one, or 2048 tokens of them in tiles of 64 x 64."""
DECODE_TOKENS: Mapping[int, int] = {1: 2, 2: 4, 3: 4}
"""Most tokens for dp4a without a table, by weight bits: its instructions fit the memory's time."""
CONFIGS: Mapping[Route, Callable[..., Any]] = {
    Route.DECODE: decode_config.LaunchConfig,
    Route.TILE: tile_config.LaunchConfig,
    Route.BINARY: binary_linear.LaunchConfig,
}
SLICED_ROUTES = frozenset({Route.DECODE, Route.TILE})
ALL_ROUTES = SLICED_ROUTES | {Route.BINARY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which kernel answers, and how it is launched."""

    route: Route
    config: Any = None
    """The route's own launch configuration; None leaves it to the kernel."""


def integer_linear(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    counters: torch.Tensor | None = None,
    fragments: FragmentWeight | None = None,
) -> torch.Tensor:
    """Multiply quantized tokens by a sliced weight with the fastest kernel known for the shape.

    Args:
        tokens: M tokens of as many columns and groups as the weight has.
        weight: N outputs.
        bias: float ``[N]`` or None.
        out_dtype: float16, bfloat16 or float32.
        counters: from `make_counters`, for every product of one stream; without them a launch that
            splits K clears its own first.
        fragments: the same weight for the binary tensor core, see `wants_fragments`; without them
            it does not answer.

    Returns:
        ``[M, N]`` of that dtype.

    Raises:
        ValueError: if tokens and weight do not fit each other.
    """
    device = tokens.codes.device
    if device.type == "cpu":
        return sliced_linear_reference(tokens, weight, bias, out_dtype=out_dtype)
    m = tokens.codes.shape[0]
    if not m:
        return tokens.codes.new_empty((0, weight.out_features), dtype=out_dtype)
    key = key_of(weight, m=m, a_bits=tokens.bits)
    plan = plan_linear(key, _table_of(device.index or 0), binary=fragments is not None)
    if plan.route is Route.BINARY:
        assert fragments is not None, "a plan without fragments is never binary"
        return launch_binary(plan, tokens, fragments, bias, out_dtype=out_dtype)
    return launch_plan(plan, tokens, weight, bias, out_dtype=out_dtype, counters=counters)


def make_counters(device: torch.device) -> torch.Tensor:
    """Zeros that split products count in and leave as zeros: int32, one for every tile."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def key_of(weight: SlicedWeight, *, m: int, a_bits: int) -> TableKey:
    """Where a table has the product of M tokens and a weight."""
    return TableKey.of(
        a_bits=a_bits,
        w_bits=weight.bits,
        group=WHOLE_ROW if weight.groups == 1 else weight.group_size,
        n=weight.out_features,
        k=weight.in_features,
        m=m,
    )


@lru_cache(maxsize=4096)
def plan_linear(key: TableKey, table: ConfigTable, *, binary: bool = False) -> Plan:
    """Choose by the table, else by the number of tokens.

    Args:
        key: the product.
        table: of the GPU.
        binary: whether the weight is at hand for the binary tensor core too.

    Raises:
        InvalidTableError: if the table has a configuration that the kernel does not know.
    """
    entry = table.lookup(key, ALL_ROUTES if binary else SLICED_ROUTES)
    if entry is None:
        few = key.m <= DECODE_TOKENS.get(key.w_bits, decode_config.MAX_TOKENS)
        return Plan(route=Route.DECODE if few else Route.TILE)
    try:
        return Plan(route=entry.route, config=CONFIGS[entry.route](**entry.config))
    except (KeyError, TypeError) as error:
        raise InvalidTableError(f"{table.gpu}: {entry.key.text}: {error}") from error


def launch_plan(
    plan: Plan,
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel of a plan, on a GPU or in the interpreter; see `integer_linear`.

    Raises:
        ValueError: if the route reads another form of the weight.
    """
    if plan.route is Route.DECODE:
        return decode_linear.decode_linear(
            tokens, weight, bias, out_dtype=out_dtype, config=plan.config, counters=counters
        )
    if plan.route is Route.TILE:
        return tile_linear.tile_linear(tokens, weight, bias, dtype=out_dtype, config=plan.config)
    raise ValueError(f"route {plan.route} does not multiply sliced weights")


def launch_binary(
    plan: Plan,
    tokens: TokenCodes | FragmentTokens,
    fragments: FragmentWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Run the binary tensor core on a GPU; tokens that are not fragments yet are cut first."""
    config = plan.config
    if isinstance(tokens, TokenCodes):
        tokens = pack_token_fragments(tokens, column_order(config))
    shape = (tokens.tokens.codes.shape[0], fragments.out_features)
    out = tokens.words.new_empty(shape, dtype=out_dtype)
    bias = None if bias is None else bias.float()
    return binary_linear.binary_linear(tokens, fragments, bias, out=out, config=config)


def wants_fragments(key: TableKey, table: ConfigTable) -> bool:
    """Whether the binary tensor core answers for any number of tokens of a product."""
    answers = (table.lookup(replace(key, m=bucket), ALL_ROUTES) for bucket in BUCKETS)
    return any(entry is not None and entry.route is Route.BINARY for entry in answers)


def column_order(config: binary_linear.LaunchConfig) -> ColumnOrder:
    """What a launch of the binary tensor core takes for a column: all at once are bits."""
    return ColumnOrder.TOKENS if config.column_tiles else ColumnOrder.BITS


@lru_cache(maxsize=16)
def _table_of(device_index: int) -> ConfigTable:
    return load_table(torch.cuda.get_device_name(device_index))
