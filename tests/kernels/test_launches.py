"""Every launch that the shipped tables and the kernels' defaults give to the shapes of real models.

A table answers for neighbours: other sizes and narrower codes. What becomes of its entry must fit
shared memory as the kernels reckon it, and cut slices, tiles and groups evenly.
"""

from itertools import product

import pytest

from kernels import half_linear, prefill_config, tile_config
from kernels.linear import PREFILL_GROUPS, plan_linear
from kernels.shared_memory import SHARED_BYTES, LoopOperands, loop_bytes
from kernels.sliced import choose_slice_bytes, field_widths
from kernels.tables import BUCKETS, CONFIGS, GROUPS, ConfigTable, Route, TableKey, read_table

LLAMA_7B = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
LLAMA_3_8B = [(6144, 4096), (28672, 4096), (4096, 14336)]
LLAMA_70B = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]
HEADS = [(32000, 4096), (128256, 4096), (128256, 8192)]
SHAPES = LLAMA_7B + LLAMA_3_8B + LLAMA_70B + HEADS
HALF_BITS = 16
MOST_HALF_TOKENS = 64
"""More are multiplied by cuBLAS."""
TABLES = [*map(read_table, sorted(CONFIGS.glob("*.json"))), ConfigTable(gpu="none", entries={})]


def padded(n, step):
    return -(-n // step) * step


def products(w_bits, a_bits):
    """Keys of all shapes, groups and buckets beside what a weight's layout says."""
    for (n, k), group, m in product(SHAPES, GROUPS, BUCKETS):
        groups = 1 if group < 0 else k // group
        slice_bytes = choose_slice_bytes(k, groups)
        key = TableKey.of(a_bits=a_bits, w_bits=w_bits, group=group, n=n, k=k, m=m)
        yield key, slice_bytes, group // slice_bytes if groups > 1 else 0


def tile_launch(plan, key, slice_bytes, group_slices):
    fields, grouped = field_widths(key.w_bits), group_slices > 0
    shape = tile_config.TileShape(
        bits=key.w_bits, m=key.m, n=padded(key.n, 64), columns=padded(key.k, 8 * slice_bytes),
        slice_bytes=slice_bytes, grouped=grouped,
    )  # fmt: skip
    known = plan.config if plan.route is Route.TILE else None
    config = (known or tile_config.select_config(shape)).fitted(
        fields, slice_bytes, grouped=grouped
    )
    return config, LoopOperands(
        field_bits=fields, slice_bytes=slice_bytes, grouped=grouped, token_bytes=1
    )


def half_launch(plan, key, slice_bytes, group_slices):
    fields, grouped = field_widths(key.w_bits), group_slices > 0
    first = half_linear.half_configs(
        bits=key.w_bits, m=key.m, n=padded(key.n, 64), columns=padded(key.k, 8 * slice_bytes)
    )[0]
    config = (plan.config or first).fitted(fields, slice_bytes, grouped=grouped)
    return config, LoopOperands(
        field_bits=fields, slice_bytes=slice_bytes, grouped=grouped, token_bytes=2
    )


def prefill_launch(plan, key, slice_bytes, group_slices, *, wide):
    fields = field_widths(key.w_bits)
    if plan.config is not None:
        config = plan.config.fitted(fields, slice_bytes, group_slices)
    elif group_slices:
        config = prefill_config.select_group_config(
            prefill_config.GroupShape(
                field_bits=fields, slice_bytes=slice_bytes, group_slices=group_slices,
                m=key.m, n=padded(key.n, 64),
            )
        )  # fmt: skip
    else:
        config = prefill_config.select_prefill_config(fields, slice_bytes, key.m)
    return config.fitted(fields, slice_bytes, group_slices, wide=True) if wide else config


def check_loop(config, operands):
    assert loop_bytes(config, operands) <= SHARED_BYTES
    assert config.num_stages >= 2
    assert operands.slice_bytes % config.block_k == 0
    assert not operands.grouped or config.block_k == operands.slice_bytes
    assert config.block_n % 16 == config.block_n % (8 * config.num_warps) == 0


def check_prefill(config, key, slice_bytes, group_slices, *, wide):
    fields = field_widths(key.w_bits)
    turn = config.turn_slices(fields, group_slices) if group_slices else None
    asked = config.shared_bytes(fields, turn)
    asked += config.scratch_bytes(grouped=group_slices > 0, wide=wide)
    assert asked * max(1, config.programs // prefill_config.PROCESSORS) <= SHARED_BYTES
    config.check_stages()
    assert slice_bytes % config.block_k == 0
    assert config.block_n % 64 == config.block_n % (16 * config.num_warps) == 0
    if group_slices:
        assert config.block_k == slice_bytes
        assert config.block_m % config.part_m == 0
        assert turn % group_slices == 0


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.gpu)
@pytest.mark.parametrize("a_bits", [8, HALF_BITS])
@pytest.mark.parametrize("w_bits", range(1, 9))
def test_every_launch_of_a_real_model_fits_and_cuts_evenly(table, w_bits, a_bits):
    for key, slice_bytes, group_slices in products(w_bits, a_bits):
        plan = plan_linear(key, table)
        piped = plan.route in (Route.PREFILL, Route.UNPACKED)
        if plan.route is Route.TILE or (
            piped and key.group > 0 and key.group not in PREFILL_GROUPS
        ):
            check_loop(*tile_launch(plan, key, slice_bytes, group_slices))
        elif plan.route is Route.HALF and key.m <= MOST_HALF_TOKENS:
            check_loop(*half_launch(plan, key, slice_bytes, group_slices))
        for wide in (False, True) if piped else ():
            config = prefill_launch(plan, key, slice_bytes, group_slices, wide=wide)
            check_prefill(config, key, slice_bytes, group_slices, wide=wide)


def test_what_was_measured_is_launched_as_it_was():
    for entry in TABLES[0].entries.values():
        key = entry.key
        plan = plan_linear(key, TABLES[0], with_fragments=True)
        groups = 1 if key.group < 0 else key.k // key.group
        slice_bytes = choose_slice_bytes(key.k, groups)
        group_slices = key.group // slice_bytes if groups > 1 else 0
        match plan.route:
            case Route.TILE:
                assert tile_launch(plan, key, slice_bytes, group_slices)[0] == plan.config
            case Route.HALF:
                assert half_launch(plan, key, slice_bytes, group_slices)[0] == plan.config
            case Route.PREFILL:
                launched = prefill_launch(plan, key, slice_bytes, group_slices, wide=False)
                assert launched == plan.config, key.text
