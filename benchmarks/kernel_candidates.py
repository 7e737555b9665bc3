"""The launches worth timing for a case: what each kernel that can answer proposes for the shape."""

from collections.abc import Iterator

from benchmarks.kernel_case import HALF_BITS, KernelCase
from kernels.decode_config import MAX_TOKENS, decode_configs
from kernels.linear import Plan
from kernels.sliced import choose_slice_bytes
from kernels.tables import Route
from kernels.tile_config import tile_configs

__all__ = ["candidate_plans"]

SLICES = 8
BLOCK_ROWS = 64


def candidate_plans(case: KernelCase) -> list[Plan]:
    """All of them, the best guess of each kernel first, kernels in turn."""
    if case.a_bits == HALF_BITS:
        return []
    routes = [list(_decode_plans(case)), list(_tile_plans(case))]
    longest = max(len(each) for each in routes)
    return [each[rank] for rank in range(longest) for each in routes if rank < len(each)]


def _decode_plans(case: KernelCase) -> Iterator[Plan]:
    if case.m > MAX_TOKENS:
        return
    g = choose_slice_bytes(case.k, case.groups)
    for config in decode_configs(
        bits=case.w_bits, n=case.n, columns=_columns(case), slice_bytes=g, m=case.m,
        grouped=case.groups > 1,
    ):  # fmt: skip
        yield Plan(route=Route.DECODE, config=config)


def _tile_plans(case: KernelCase) -> Iterator[Plan]:
    if case.m == 1:
        return
    for config in tile_configs(
        bits=case.w_bits, n=-(-case.n // BLOCK_ROWS) * BLOCK_ROWS, columns=_columns(case),
        m=case.m, grouped=case.groups > 1,
    ):  # fmt: skip
        yield Plan(route=Route.TILE, config=config)


def _columns(case: KernelCase) -> int:
    step = SLICES * choose_slice_bytes(case.k, case.groups)
    return -(-case.k // step) * step
