"""The one hop from (weight bits, activation bits, tokens) to the kernel that answers.

    activations   tokens                     kernel                     module of `kernels`
    2..8 bits     few, by weight bits        dp4a product of rows       `decode_linear`
                  more                       int8 tensor cores          `tile_linear`
                  many, on Hopper            the same, pipelined        `prefill_linear`
                  where both have few bits   binary tensor cores        `binary_linear`
    16 bits       few                        16-bit tensor cores        `half_decode`
                  more                       the same, by tiles         `half_linear`
    any           on a CPU                   plain torch                `sliced_reference`

A table of the GPU says which and with which configuration (`kernels.tables`); without one the
default of this module chooses the kernel, and the kernel its own configuration. All kernels of 2..8
bits compute the Y of `kernels.int_linear`, and with a scale a row the same bits.

Shape legend: M tokens, N outputs, K inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from kernels import binary_linear as binary
from kernels import decode_config, half_decode, half_linear, prefill_config, tile_config
from kernels.decode_linear import decode_linear
from kernels.fragments import ColumnOrder, FragmentTokens, FragmentWeight
from kernels.prefill_linear import prefill_linear
from kernels.quantize_tokens import MAX_FEATURES, TokenForm, code_tokens
from kernels.shared_memory import room_of
from kernels.sliced import SlicedWeight, unslice_codes
from kernels.sliced_reference import sliced_linear_reference
from kernels.tables import (
    BUCKETS,
    GROUPS,
    WHOLE_ROW,
    ConfigTable,
    InvalidTableError,
    Route,
    TableKey,
    load_table,
)
from kernels.tile_linear import SplitWorkspace, tile_linear
from kernels.token_fragments import pack_token_fragments
from kernels.tokens import BYTE_BITS, BYTE_SHIFT, TokenCodes
from kernels.unpack import unpack_half_reference, unpack_int8

__all__ = [
    "Plan",
    "can_multiply",
    "column_order",
    "integer_linear",
    "key_of",
    "launch_binary",
    "launch_half",
    "launch_plan",
    "make_counters",
    "plan_linear",
    "quantized_linear",
    "wants_fragments",
    "weight_only_linear",
]

HALF_BITS = 16
MOST_TILES = 1 << 16
"""Of any launch that splits K: 57344 rows one by one."""
DECODE_TOKENS: Mapping[int, int] = {1: 2, 2: 4, 3: 4}
"""Most tokens for dp4a without a table, by weight bits: its instructions fit the memory's time."""
LEAST_PREFILL = 1024
"""Tokens for the pipelined product without a table."""
LEAST_PREFILL_GROUPED = 128
"""The same where columns have scales in groups, which cost the other kernel four times the rest."""
PREFILL_GROUPS = (64, 128)
HOPPER = (9, 0)
CONFIGS: Mapping[Route, Callable[..., Any]] = {
    Route.DECODE: decode_config.LaunchConfig,
    Route.TILE: tile_config.LaunchConfig,
    Route.PREFILL: prefill_config.PrefillConfig,
    Route.UNPACKED: prefill_config.PrefillConfig,
    Route.BINARY: binary.LaunchConfig,
    Route.HALF: half_linear.HalfConfig,
    Route.HALF_DECODE: half_decode.HalfDecodeConfig,
}
LEAST_PREFILL_OUTPUTS = 512
"""Fewer do not fill two of its tiles."""
ALL_ROUTES = frozenset(Route)
SLICED_ROUTES = ALL_ROUTES - {Route.BINARY}


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
    device, m = tokens.codes.device, tokens.codes.shape[0]
    if device.type == "cpu":
        return sliced_linear_reference(tokens, weight, bias, out_dtype=out_dtype)
    if not m:
        return tokens.codes.new_empty((0, weight.out_features), dtype=out_dtype)
    key = key_of(weight, m=m, a_bits=tokens.bits)
    plan = plan_linear(key, _table_of(device.index or 0), with_fragments=fragments is not None)
    if plan.route is Route.BINARY:
        assert fragments is not None, "a plan without fragments is never binary"
        return launch_binary(plan, tokens, fragments, bias, out_dtype=out_dtype)
    return launch_plan(plan, tokens, weight, bias, out_dtype=out_dtype, counters=counters)


def quantized_linear(
    x: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None = None, *, a_bits: int
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
    form = TokenForm(bits=a_bits, groups=weight.groups, columns=weight.columns)
    tokens = code_tokens(x.reshape(-1, x.shape[-1]).contiguous(), form)
    out_MN = integer_linear(tokens, weight, bias, out_dtype=x.dtype)
    return out_MN.view(*x.shape[:-1], weight.out_features)


def can_multiply(in_features: int, groups: int) -> bool:
    """Whether `quantized_linear` takes a weight of so many columns and scale groups."""
    return in_features <= MAX_FEATURES and (groups == 1 or in_features // groups in GROUPS)


def weight_only_linear(
    x_MK: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply activations of 16 bits by a sliced weight.

    Args:
        x_MK: float16 or bfloat16 ``[M, K]``, rows contiguous; float32 too on a CPU.
        weight: N outputs.
        bias: float ``[N]`` or None.

    Returns:
        ``[M, N]`` in the dtype of ``x_MK``.

    Raises:
        ValueError: if K or the dtype does not fit.
    """
    device = x_MK.device
    if device.type == "cpu":
        shift = BYTE_SHIFT if weight.bits == BYTE_BITS else 0
        codes_NK = unslice_codes(weight).int() - shift
        w_NK = unpack_half_reference(codes_NK, weight, x_MK.dtype)
        bias = None if bias is None else bias.to(x_MK.dtype)
        return torch.nn.functional.linear(x_MK, w_NK, bias)
    key = key_of(weight, m=max(1, len(x_MK)), a_bits=HALF_BITS)
    plan = plan_linear(key, _table_of(device.index or 0))
    if plan.route is Route.HALF_DECODE and not half_decode.can_half_decode(x_MK, weight):
        plan = Plan(route=Route.HALF)
    return launch_half(plan, x_MK, weight, bias)


def make_counters(device: torch.device) -> torch.Tensor:
    """Zeros that split products count in and leave as zeros: int32, one for every tile."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def key_of(weight: SlicedWeight, *, m: int, a_bits: int) -> TableKey:
    """Where a table has the product of M tokens and a weight."""
    group = WHOLE_ROW if weight.groups == 1 else weight.group_size
    return _key_of(a_bits, weight.bits, group, weight.out_features, weight.in_features, m)


@lru_cache(maxsize=1 << 14)
def _key_of(a_bits: int, w_bits: int, group: int, n: int, k: int, m: int) -> TableKey:
    """The same of numbers: what is looked up at every product is checked once."""
    return TableKey.of(a_bits=a_bits, w_bits=w_bits, group=group, n=n, k=k, m=m)


@lru_cache(maxsize=4096)
def plan_linear(key: TableKey, table: ConfigTable, *, with_fragments: bool = False) -> Plan:
    """Choose by the table, else by the number of tokens.

    Args:
        key: the product.
        table: of the GPU.
        with_fragments: whether the weight is at hand for the binary tensor core too.

    Raises:
        InvalidTableError: if the table has a configuration that the kernel does not know.
    """
    entry = table.lookup(key, ALL_ROUTES if with_fragments else SLICED_ROUTES)
    if entry is None:
        return Plan(route=_default_route(key))
    try:
        return Plan(route=entry.route, config=CONFIGS[entry.route](**entry.config))
    except TypeError as error:
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
        ValueError: if the route multiplies other operands.
    """
    config = plan.config
    match plan.route:
        case Route.DECODE:
            return decode_linear(
                tokens, weight, bias, out_dtype=out_dtype, config=config, counters=counters
            )
        case Route.PREFILL if not _can_prefill(weight):
            return launch_plan(
                Plan(route=Route.TILE), tokens, weight, bias, out_dtype=out_dtype, counters=counters
            )
        case Route.TILE:
            config = (config or _select_tile(tokens, weight)).fitted(
                weight.field_bits,
                weight.slice_bytes,
                grouped=weight.groups > 1,
                room=room_of(tokens.codes.device),
            )
            workspace = _workspace(config, tokens, weight, counters)
            return tile_linear(
                tokens, weight, bias, out_dtype=out_dtype, config=config, workspace=workspace
            )
        case Route.PREFILL | Route.UNPACKED:
            read = weight if plan.route is Route.PREFILL else unpack_int8(weight)
            if config is not None:
                config = config.fitted(read.field_bits, read.slice_bytes, _group_slices(read))
            return prefill_linear(tokens, read, bias, out_dtype=out_dtype, config=config)
        case _:
            raise ValueError(f"route {plan.route} does not multiply codes by sliced weights")


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
    return binary.binary_linear(tokens, fragments, bias, out=out, config=config)


def launch_half(
    plan: Plan, x_MK: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the kernel of a plan for 16-bit activations on a GPU; see `weight_only_linear`.

    Raises:
        ValueError: if the operands do not fit each other or the route.
    """
    match plan.route:
        case Route.HALF_DECODE:
            return half_decode.half_decode(x_MK, weight, bias, config=plan.config)
        case Route.HALF:
            return half_linear.half_linear(x_MK, weight, bias, config=plan.config)
        case _:
            raise ValueError(f"route {plan.route} does not multiply 16-bit activations")


def wants_fragments(key: TableKey, table: ConfigTable) -> bool:
    """Whether the binary tensor core answers for any number of tokens of a product."""
    answers = (table.lookup(replace(key, m=bucket)) for bucket in BUCKETS)
    return any(entry is not None and entry.route is Route.BINARY for entry in answers)


def column_order(config: binary.LaunchConfig) -> ColumnOrder:
    """What a launch of the binary tensor core takes for a column: all at once are bits."""
    return ColumnOrder.TOKENS if config.column_tiles else ColumnOrder.BITS


def _default_route(key: TableKey) -> Route:
    if key.a_bits == HALF_BITS:
        return Route.HALF_DECODE if key.m <= half_decode.MAX_TOKENS else Route.HALF
    if key.m <= DECODE_TOKENS.get(key.w_bits, decode_config.MAX_TOKENS):
        return Route.DECODE
    if key.n < LEAST_PREFILL_OUTPUTS:
        return Route.TILE
    if key.group == WHOLE_ROW:
        return Route.PREFILL if key.m >= LEAST_PREFILL else Route.TILE
    piped = key.group in PREFILL_GROUPS and key.w_bits < BYTE_BITS
    return Route.PREFILL if piped and key.m >= LEAST_PREFILL_GROUPED else Route.TILE


def _can_prefill(weight: SlicedWeight) -> bool:
    """Whether the pipelined product knows the GPU and the groups."""
    device = weight.scale.device
    known = weight.groups == 1 or weight.group_rows is not None
    return known and device.type == "cuda" and _capability(device.index or 0) == HOPPER


def _group_slices(weight: SlicedWeight) -> int:
    return weight.group_size // weight.slice_bytes if weight.groups > 1 else 0


def _select_tile(tokens: TokenCodes, weight: SlicedWeight) -> tile_config.LaunchConfig:
    shape = tile_config.TileShape(
        bits=weight.bits,
        m=tokens.codes.shape[0],
        n=weight.padded_rows,
        columns=weight.columns,
        slice_bytes=weight.slice_bytes,
        grouped=weight.groups > 1,
    )
    return tile_config.select_config(shape)


def _workspace(
    config: tile_config.LaunchConfig,
    tokens: TokenCodes,
    weight: SlicedWeight,
    counters: torch.Tensor | None,
) -> SplitWorkspace | None:
    """Memory of partial sums beside counters that are zero already, which saves a launch."""
    if config.splits == 1 or counters is None:
        return None
    tiles_m = -(-tokens.codes.shape[0] // config.block_m)
    tiles = tiles_m * -(-weight.padded_rows // config.block_n)
    size = config.splits * tiles * config.block_n * config.block_m
    return SplitWorkspace(partials=counters.new_empty(size), arrivals=counters)


@lru_cache(maxsize=16)
def _table_of(device_index: int) -> ConfigTable:
    return load_table(torch.cuda.get_device_name(device_index))


@lru_cache(maxsize=16)
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
