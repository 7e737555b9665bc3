"""What tiles become on an H100, read from the machine code; no GPU needed."""

import pytest
from triton.experimental.gluon import language as gl

from kernels.half_linear import HalfConfig, half_configs
from kernels.prefill_config import PrefillConfig, prefill_configs
from kernels.shared_memory import SHARED_BYTES, LoopOperands, loop_bytes
from kernels.sliced import field_widths
from kernels.tile_config import LaunchConfig, TileShape, select_config
from tests.kernels.machine_code import compile_kernel

POINTERS = {
    "x_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sums_ptr": "*i32",
    "w0_ptr": "*u8", "w1_ptr": "*u8", "w2_ptr": "*u8", "w_scale_ptr": "*fp16",
    "w_zero_ptr": "*i32", "w_sums_ptr": "*i32", "bias_ptr": "*fp16", "out_ptr": "*bf16",
    "partial_ptr": "*i32", "arrivals_ptr": "*i32",
}  # fmt: skip
UNALIGNED = ("M", "BLOCKS", "GROUPS", "GROUP_SIZE", "K")
# instructions of a weight that memory speed leaves room for, by bits
BUDGET = {1: 1.23, 2: 2.46, 3: 3.7, 4: 4.9, 5: 6.1, 6: 7.4, 7: 8.6, 8: 9.8}


def widths(bits):
    return dict(zip(("F0", "F1", "F2"), (*field_widths(bits), 0, 0), strict=False))


def weights_of_a_turn(bits, block_n, width, warps):
    return block_n * width * (8 // field_widths(bits)[-1]) / (32 * warps)


def reckoned(config, bits, token_bytes):
    operands = LoopOperands(
        field_bits=field_widths(bits), slice_bytes=128, grouped=False, token_bytes=token_bytes
    )
    return loop_bytes(config, operands)


def tile_code(bits, config, group_slices=0, slice_bytes=128):
    constants = {
        **widths(bits), "SLICE": slice_bytes, "STORED_N": 64, "GROUP_SLICES": group_slices,
        "MULTIPLIER": 1, "HAS_BIAS": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "SPLITS": config.splits, "GROUP_M": config.group_m,
        "X_TMA": False, "PDL": config.pdl, "INTERP": False,
    }  # fmt: skip
    types = POINTERS | ({"partial_ptr": "*fp32"} if group_slices else {})
    return compile_kernel(
        "kernels.tile_linear", "_tile_kernel",
        types=types, constants=constants, unaligned=UNALIGNED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_small_batch_stays_within_the_instructions_that_memory_allows(bits):
    shape = TileShape(bits=bits, m=16, n=22016, columns=4096, slice_bytes=128)
    config = select_config(shape)

    code = tile_code(bits, config)

    weights = weights_of_a_turn(bits, config.block_n, config.block_k, config.num_warps)
    loop = code.product_loop
    assert not code.spills
    assert any(op.startswith(("IGMMA", "IMMA")) for op in loop)
    assert any(op.startswith("LDGSTS") and op.endswith("128") for op in loop)
    assert loop.total() / weights <= BUDGET[bits]


@pytest.mark.parametrize(("bits", "m"), [(3, 64), (4, 2048)])
def test_larger_batches_keep_one_warp_group_matrix_instruction_per_32_columns(bits, m):
    config = select_config(TileShape(bits=bits, m=m, n=8192, columns=8192, slice_bytes=128))

    code = tile_code(bits, config)

    # a code of several fields costs no product more
    turns = 8 // field_widths(bits)[-1]
    tiles = config.block_n // (16 * config.num_warps) * max(1, config.block_m // 256)
    products = sum(n for op, n in code.product_loop.items() if op.startswith("IGMMA"))
    assert products == turns * tiles * config.block_k // 32
    assert not code.spills
    assert code.shared_bytes == reckoned(config, bits, token_bytes=1) <= SHARED_BYTES


@pytest.mark.parametrize(("bits", "group_slices", "m"), [(2, 1, 16), (4, 2, 2048)])
def test_group_scales_spill_nothing(bits, group_slices, m):
    shape = TileShape(bits=bits, m=m, n=4096, columns=4096, slice_bytes=64, grouped=True)

    code = tile_code(bits, select_config(shape), group_slices, slice_bytes=64)

    assert not code.spills
    assert not code.opcodes["FFMA"]


def test_a_dependent_launch_waits_before_it_reads_tokens():
    config = LaunchConfig(
        block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3, splits=2, pdl=True
    )

    assert tile_code(2, config).count("ACQBULK")


def half_code(bits, kind, config, slice_bytes=128):
    types = {
        "x_ptr": f"*{kind}", "x_sums_ptr": "*fp32", "w0_ptr": "*i16", "w1_ptr": "*i16",
        "w2_ptr": "*i16", "w_scale_ptr": "*fp16", "w_zero_ptr": "*i32", "bias_ptr": "*fp16",
        "out_ptr": f"*{kind}", "partial_ptr": "*fp32", "arrivals_ptr": "*i32",
    }  # fmt: skip
    constants = {
        **widths(bits), "BITS": bits, "SLICE": slice_bytes, "STORED_N": 64, "GROUP_SLICES": 0,
        "MULTIPLIER": 1, "HAS_BIAS": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "SPLITS": config.splits, "INTERP": False,
    }  # fmt: skip
    return compile_kernel(
        "kernels.half_linear", "_half_kernel",
        types=types, constants=constants, unaligned=UNALIGNED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "kind"), [(4, "fp16"), (3, "bf16")])
def test_half_activations_use_tensor_cores_without_spills(bits, kind):
    config = half_configs(bits=bits, m=1, n=22016, columns=4096)[0]

    code = half_code(bits, kind, config)

    loop = code.product_loop
    weights = weights_of_a_turn(bits, config.block_n, config.block_k, config.num_warps)
    assert not code.spills
    assert any(op.startswith(("HGMMA", "HMMA")) for op in loop)
    assert loop.total() / weights <= BUDGET[bits]
    assert code.shared_bytes == reckoned(config, bits, token_bytes=2)


def descriptor(kind, block, width):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8, rank=len(block))
    return f"tensordesc<{kind}{list(block)},{layout!r}>"


def result_descriptor(tokens, outputs):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return f"tensordesc<bf16{[tokens, outputs]},{layout!r}>"


def prefill_code(bits, config):
    fields = field_widths(bits)
    turn = 8 // fields[-1]
    types = POINTERS | {
        f"w{i}_desc": descriptor(
            "i8" if bits == 8 else "u8",
            ((fields[i] if i < len(fields) else fields[0]) // fields[-1],
             config.block_n // 64, 64, config.block_k),
            config.block_k,
        )
        for i in range(3)
    }  # fmt: skip
    types["x_desc"] = descriptor("i8", (turn, config.block_m, config.block_k), config.block_k)
    types["out_desc"] = result_descriptor(config.block_m, config.block_n)
    constants = {
        **widths(bits), "TURN": turn, "SLICE": 128, "MULTIPLIER": 1, "HAS_BIAS": True,
        "STAGED": config.staged, "PDL": config.pdl,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "STAGES": config.stages, "GROUP_M": config.group_m, "num_warps": config.num_warps,
    }  # fmt: skip
    return compile_kernel(
        "kernels.prefill_linear", "_prefill_kernel",
        types=types, constants=constants, unaligned=UNALIGNED, num_warps=config.num_warps,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [3, 4])
def test_prefill_unpacks_while_a_product_is_under_way(bits):
    fields = field_widths(bits)
    turn = 8 // fields[-1]
    config = next(each for each in prefill_configs(fields, 128) if each.staged)

    code = prefill_code(bits, config)

    loop = code.product_loop
    products = turn * config.block_n // (16 * config.num_warps) * config.block_k // 32
    assert sum(n for op, n in loop.items() if op.startswith("IGMMA")) == products
    assert sum(n for op, n in loop.items() if op.startswith("UTMALDG")) == 1 + len(fields)
    assert not any(op.startswith(("LDL", "STL")) for op in loop)
    # results leave by a copy, not by the threads
    assert code.count("UTMASTG")
    assert code.count("ACQBULK"), "it waits for the tokens"
    # every wait leaves one product under way
    waits = [operands for op, operands in code.instructions if op.startswith("WARPGROUP.DEPBAR")]
    assert sum("0x1" in operands for operands in waits) == turn


@pytest.mark.parametrize(
    ("block_m", "block_n", "programs", "warps"), [(16, 64, 3, 4), (64, 256, 1, 8)]
)
def test_a_pipeline_that_three_bits_borrow_of_four_asks_for_no_more_than_reckoned(
    block_m, block_n, programs, warps
):
    borrowed = PrefillConfig(
        block_m=block_m, block_n=block_n, block_k=128, stages=4, num_warps=warps,
        programs=132 * programs, staged=True, pdl=True,
    )  # fmt: skip
    config = borrowed.fitted((2, 1), 128)

    code = prefill_code(3, config)

    most = config.shared_bytes((2, 1)) + config.scratch_bytes(grouped=False, wide=False)
    assert code.shared_bytes <= most <= SHARED_BYTES // programs


@pytest.mark.parametrize(("bits", "m", "slice_bytes"), [(7, 32, 128), (3, 64, 32), (1, 16, 128)])
def test_half_activations_ask_for_the_shared_memory_that_is_reckoned(bits, m, slice_bytes):
    fields = field_widths(bits)
    wanted = HalfConfig(
        block_m=m, block_n=64, block_k=128 if bits < 5 else 64, num_warps=4, num_stages=4
    )
    config = wanted.fitted(fields, slice_bytes, grouped=False)

    code = half_code(bits, "bf16", config, slice_bytes)

    assert code.shared_bytes == reckoned(config, bits, token_bytes=2) <= SHARED_BYTES
