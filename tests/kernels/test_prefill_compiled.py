"""What the pipelined product with scales in groups becomes on an H100; no GPU needed."""

from collections import Counter

import pytest
import triton
from triton.experimental.gluon import language as gl

from kernels.prefill_config import GroupShape, group_configs
from kernels.sliced import field_widths
from tests.kernels.machine_code import compile_kernel

SHARED_BYTES = 227 * 1024
TRITON = triton.__version__[:3]
"""3.6 is what the GPU of the benchmarks runs; the compiler of 3.9 spills a few words."""
TYPES = {
    "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "rows_ptr": "*i32", "terms_ptr": "*fp32",
    "bias_ptr": "*fp16", "out_ptr": "*bf16", "stride_om": "i32", "M": "i32", "N": "i32",
    "NP": "i32", "BLOCKS": "i32", "GROUPS": "i32", "BOUND": "i32",
}  # fmt: skip


def descriptor(kind, block, width):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8, rank=len(block))
    return f"tensordesc<{kind}{list(block)},{layout!r}>"


def compiled(shape, config):
    bits, width = shape.field_bits, config.block_k
    types = dict(TYPES)
    for i, f in enumerate((*bits, bits[0], bits[0])[:3]):
        box = (f * config.turn // 8, config.block_n // 64, 64, width)
        types[f"w{i}_desc"] = descriptor("u8", box, width)
    types["x_desc"] = descriptor("i8", (config.turn, config.block_m, width), width)
    constants = {
        **dict(zip(("F0", "F1", "F2"), (*bits, 0, 0), strict=False)), "TURN": config.turn,
        "SLICE": width, "GROUP_SLICES": shape.group_slices, "MULTIPLIER": 1, "HAS_BIAS": True,
        "SUBNORMAL": config.subnormal and not config.convert, "CONVERT": config.convert,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "PART_M": config.part_m, "STAGES": config.stages, "ROUND": config.round_slices,
        "GROUP_M": config.group_m, "num_warps": config.num_warps,
    }  # fmt: skip
    return compile_kernel(
        "kernels._prefill_groups_kernel", "prefill_groups_kernel",
        types=types, constants=constants, unaligned=("M", "BLOCKS", "GROUPS"),
        num_warps=config.num_warps,
    )  # fmt: skip


def product_loop(code):
    """Opcodes of the longest loop of products that neither stores results nor ends the kernel."""
    loops = [Counter(code.instructions[at][0] for at in loop) for loop in code.loops]
    return next(
        loop for loop in loops
        if any(op.startswith("IGMMA") for op in loop)
        and not any(op.startswith(("STG", "EXIT")) for op in loop)
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "m"), [(4, 2048), (2, 2048), (3, 100)])
def test_products_run_while_sums_of_groups_are_scaled(bits, m):
    shape = GroupShape(field_bits=field_widths(bits), slice_bytes=64, group_slices=2, m=m, n=4096)
    config = group_configs(shape)[0]

    code = compiled(shape, config)

    loop = product_loop(code)
    slices = max(config.turn, config.round_slices)
    groups = slices // shape.group_slices
    pieces = config.block_m * config.block_n // (16 * config.num_warps * config.part_m)
    products = sum(n for op, n in loop.items() if op.startswith("IGMMA"))
    assert products == pieces * slices * config.block_k // 32
    stored = sum(n for op, n in loop.items() if op.startswith("STL"))
    assert stored <= (0 if TRITON == "3.6" else 12 * groups)
    assert code.shared_bytes <= SHARED_BYTES
    # a piece is two products, one for each slice: all that are waited for leave one piece running
    waits = Counter(
        operands.split("gsb0, ")[1].split()[0]
        for op, operands in code.instructions if op.startswith("WARPGROUP.DEPBAR")
    )  # fmt: skip
    assert waits == {"0x2": pieces * groups, "0x0": 1}
    # one multiply-add for each sum of a group, and no FFMA.FTZ, which knows no subnormals
    assert loop["FFMA"] == pieces * groups * config.part_m // 2
    assert not code.count("FFMA.FTZ")
    # nor any conversion: I2F.RP belongs to a division
    assert not any(op.startswith("I2F") and not op.endswith("RP") for op in loop)


@pytest.mark.parametrize("bits", [4, 2])
def test_two_programs_of_four_warps_share_a_processor(bits):
    shape = GroupShape(field_bits=(bits,), slice_bytes=64, group_slices=2, m=2048, n=4096)
    config = next(each for each in group_configs(shape) if each.num_warps == 4)

    code = compiled(shape, config)

    # a multiprocessor keeps a KiB of every program's shared memory for itself
    assert 2 * (code.shared_bytes + 1024) <= SHARED_BYTES + 1024
    loop = product_loop(code)
    outputs = config.block_m * config.block_n // (32 * config.num_warps)
    # a conversion and a multiply-add for each sum of a group, and half as much for all else
    assert loop["I2FP.F32.S32"] == loop["FFMA"] == outputs
    assert sum(loop.values()) <= (2.6 if TRITON == "3.6" else 2.9) * 2 * outputs
    assert sum(n for op, n in loop.items() if op.startswith("STL")) <= 8
