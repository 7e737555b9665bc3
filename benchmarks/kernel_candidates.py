"""The launches worth timing for a case: what each kernel that can answer proposes for the shape."""

from collections.abc import Iterator

from benchmarks.kernel_case import HALF_BITS, KernelCase
from kernels import binary_linear
from kernels.binary_linear import ProductShape, binary_configs
from kernels.decode_config import MAX_TOKENS, decode_configs
from kernels.fragments import ColumnOrder, columns_a_token
from kernels.half_decode import HalfDecodeShape, can_group, half_decode_configs
from kernels.half_linear import half_configs
from kernels.linear import PREFILL_GROUPS, Plan
from kernels.prefill_config import GroupShape, group_configs, prefill_configs
from kernels.sliced import choose_slice_bytes, field_widths
from kernels.tables import Route
from kernels.tile_config import TileShape, tile_configs

__all__ = ["candidate_plans"]

# calculated: int8 passes the binary tensor core at 6 to 8 products of planes, and at 64 columns
MOST_PRODUCTS = 8
MOST_BIT_COLUMNS = 64
LEAST_PREFILL = 9
LEAST_PREFILL_GROUPED = 64
LEAST_TOKEN_COLUMNS = 64
LEAST_UNPACKED = 1024
MOST_HALF_TOKENS = 64
BYTE_BITS = 8
MOST_BINARY = 14
MOST_SINGLE_TILES = 4
SLICES = 8
BLOCK_ROWS = 64


def candidate_plans(case: KernelCase, *, interpreted: bool = False) -> list[Plan]:
    """All of them, the best guess of each kernel first, kernels in turn.

    Args:
        case: what to multiply.
        interpreted: leave out what Triton's interpreter cannot run.
    """
    if case.a_bits == HALF_BITS:
        return [] if interpreted else list(_half_plans(case))
    routes = [list(_decode_plans(case)), list(_tile_plans(case))]
    if not interpreted:
        routes += [list(_prefill_plans(case)), list(_binary_plans(case))]
    longest = max(len(each) for each in routes)
    return [each[rank] for rank in range(longest) for each in routes if rank < len(each)]


def _decode_plans(case: KernelCase) -> Iterator[Plan]:
    if case.m > MAX_TOKENS:
        return
    g, grouped = _slice_bytes(case), case.groups > 1
    for config in decode_configs(
        bits=case.w_bits, n=case.n, columns=_columns(case), slice_bytes=g, m=case.m, grouped=grouped
    ):
        yield Plan(route=Route.DECODE, config=config)


def _tile_plans(case: KernelCase) -> Iterator[Plan]:
    shape = TileShape(
        bits=case.w_bits,
        m=case.m,
        n=_padded_rows(case),
        columns=_columns(case),
        slice_bytes=_slice_bytes(case),
        grouped=case.groups > 1,
    )
    for config in tile_configs(shape)[: MOST_SINGLE_TILES if case.m == 1 else None]:
        yield Plan(route=Route.TILE, config=config)


def _prefill_plans(case: KernelCase) -> Iterator[Plan]:
    if case.m < LEAST_PREFILL:
        return
    if case.groups > 1:
        yield from _grouped_prefill_plans(case)
        return
    for config in prefill_configs(field_widths(case.w_bits), _slice_bytes(case), case.m):
        yield Plan(route=Route.PREFILL, config=config)
    if case.m < LEAST_UNPACKED or case.w_bits == BYTE_BITS:
        return
    for config in prefill_configs((BYTE_BITS,), _slice_bytes(case)):
        yield Plan(route=Route.UNPACKED, config=config)


def _grouped_prefill_plans(case: KernelCase) -> Iterator[Plan]:
    known = case.group_size in PREFILL_GROUPS and case.w_bits != BYTE_BITS
    if not known or case.m < LEAST_PREFILL_GROUPED:
        return
    g = _slice_bytes(case)
    shape = GroupShape(
        field_bits=field_widths(case.w_bits), slice_bytes=g, group_slices=case.group_size // g,
        m=case.m, n=_padded_rows(case),
    )  # fmt: skip
    for config in group_configs(shape):
        yield Plan(route=Route.PREFILL, config=config)


def _half_plans(case: KernelCase) -> Iterator[Plan]:
    # more tokens dequantize once and ask cuBLAS: nothing to choose
    if case.m > MOST_HALF_TOKENS:
        return
    decoded = list(_half_decode_plans(case))
    yield from decoded
    wanted = half_configs(bits=case.w_bits, m=case.m, n=_padded_rows(case), columns=_columns(case))
    fields, width, grouped = field_widths(case.w_bits), _slice_bytes(case), case.groups > 1
    fitted = (config.fitted(fields, width, grouped=grouped) for config in wanted)
    # where shared memory has room for less, two of them may be one
    tiled = list(dict.fromkeys(fitted))
    for config in tiled[: MOST_SINGLE_TILES if decoded else None]:
        yield Plan(route=Route.HALF, config=config)


def _half_decode_plans(case: KernelCase) -> Iterator[Plan]:
    whole = case.groups == 1 or can_group(case.groups, case.group_size, _slice_bytes(case))
    if case.m > MAX_TOKENS or not whole:
        return
    shape = HalfDecodeShape(
        bits=case.w_bits, n=case.n, columns=_columns(case), grouped=case.groups > 1
    )
    for config in half_decode_configs(shape):
        yield Plan(route=Route.HALF_DECODE, config=config)


def _binary_plans(case: KernelCase) -> Iterator[Plan]:
    order = _column_order(case)
    if order is None:
        return
    shape = ProductShape(
        order=order, m=case.m, n=case.n, k=case.k, weight_bits=case.w_bits, token_bits=case.a_bits
    )
    configs = dict.fromkeys((binary_linear.select_config(shape), *binary_configs(shape)))
    for config in list(configs)[:MOST_BINARY]:
        yield Plan(route=Route.BINARY, config=config)


def _column_order(case: KernelCase) -> ColumnOrder | None:
    """How tokens would be cut; None where int8 is known to be faster."""
    if case.m * columns_a_token(case.a_bits) <= MOST_BIT_COLUMNS:
        return ColumnOrder.BITS if case.group_size in {-1, 128} else None
    few_products = case.w_bits * case.a_bits <= MOST_PRODUCTS and case.group_size == -1
    return ColumnOrder.TOKENS if few_products and case.m >= LEAST_TOKEN_COLUMNS else None


def _slice_bytes(case: KernelCase) -> int:
    return choose_slice_bytes(case.k, case.groups)


def _columns(case: KernelCase) -> int:
    return _padded(case.k, SLICES * _slice_bytes(case))


def _padded_rows(case: KernelCase) -> int:
    return _padded(case.n, BLOCK_ROWS)


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step
