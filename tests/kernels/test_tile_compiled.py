"""What tiles become on an H100, read from the machine code; no GPU needed."""

import pytest
from triton.experimental.gluon import language as gl

from kernels.prefill_config import prefill_configs
from kernels.sliced import field_widths
from kernels.tile_config import LaunchConfig, TileShape, select_config
from tests.kernels.tile_cases import load_kernel_modules
from tests.kernels.tile_machine_code import compile_kernel, opcodes, product_loop, spills

POINTERS = {
    "x_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sums_ptr": "*i32",
    "w0_ptr": "*u8", "w1_ptr": "*u8", "w2_ptr": "*u8", "w_scale_ptr": "*fp16",
    "w_zero_ptr": "*i32", "w_sums_ptr": "*i32", "bias_ptr": "*fp16", "out_ptr": "*bf16",
    "partial_ptr": "*i32", "arrivals_ptr": "*i32",
}  # fmt: skip
# instructions of a weight that memory speed leaves room for, by bits
BUDGET = {1: 1.23, 2: 2.46, 3: 3.7, 4: 4.9, 5: 6.1, 6: 7.4, 7: 8.6, 8: 9.8}


def compiled(names, monkeypatch):
    return load_kernel_modules(names, interpreted=False, monkeypatch=monkeypatch)


def widths(bits):
    return dict(zip(("F0", "F1", "F2"), (*field_widths(bits), 0, 0), strict=False))


def weights_of_a_turn(bits, block_n, width, warps):
    return block_n * width * (8 // field_widths(bits)[-1]) / (32 * warps)


def tile_code(module, tmp_path, bits, config, group_slices=0, slice_bytes=128):
    constants = {
        **widths(bits), "SLICE": slice_bytes, "STORED_N": 64, "GROUP_SLICES": group_slices,
        "MULTIPLIER": 1, "HAS_BIAS": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "SPLITS": config.splits, "GROUP_M": config.group_m,
        "X_TMA": False, "PDL": config.pdl, "INTERP": False,
    }  # fmt: skip
    types = POINTERS | ({"partial_ptr": "*fp32"} if group_slices else {})
    kernel = module._tile_kernel  # noqa: SLF001  what the launcher launches
    return compile_kernel(
        kernel, types, constants, tmp_path,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_small_batch_stays_within_the_instructions_that_memory_allows(
    monkeypatch, tmp_path, bits
):
    module = compiled(["field_codes", "split_sum", "tile_linear"], monkeypatch)
    shape = TileShape(bits=bits, m=16, n=22016, columns=4096, slice_bytes=128)
    config = select_config(shape)

    code = tile_code(module, tmp_path, bits, config)

    weights = weights_of_a_turn(bits, config.block_n, config.block_k, config.num_warps)
    loop = product_loop(code)
    assert not spills(opcodes(code))
    assert any(op.startswith(("IGMMA", "IMMA")) for op in loop)
    assert any(op.startswith("LDGSTS") and op.endswith("128") for op in loop)
    assert loop.total() / weights <= BUDGET[bits]


@pytest.mark.parametrize(("bits", "m"), [(3, 64), (4, 2048)])
def test_larger_batches_keep_one_warp_group_matrix_instruction_per_32_columns(
    monkeypatch, tmp_path, bits, m
):
    module = compiled(["field_codes", "split_sum", "tile_linear"], monkeypatch)
    config = select_config(TileShape(bits=bits, m=m, n=8192, columns=8192, slice_bytes=128))

    code = tile_code(module, tmp_path, bits, config)

    # a code of several fields costs no product more
    turns = 8 // field_widths(bits)[-1]
    tiles = config.block_n // (16 * config.num_warps) * max(1, config.block_m // 256)
    products = sum(n for op, n in product_loop(code).items() if op.startswith("IGMMA"))
    assert products == turns * tiles * config.block_k // 32
    assert not spills(opcodes(code))


@pytest.mark.parametrize(("bits", "group_slices", "m"), [(2, 1, 16), (4, 2, 2048)])
def test_group_scales_spill_nothing(monkeypatch, tmp_path, bits, group_slices, m):
    module = compiled(["field_codes", "split_sum", "tile_linear"], monkeypatch)
    shape = TileShape(bits=bits, m=m, n=4096, columns=4096, slice_bytes=64, grouped=True)

    code = tile_code(module, tmp_path, bits, select_config(shape), group_slices, slice_bytes=64)

    assert not spills(opcodes(code))
    assert "FFMA" not in opcodes(code)


def test_a_dependent_launch_waits_before_it_reads_tokens(monkeypatch, tmp_path):
    module = compiled(["field_codes", "split_sum", "tile_linear"], monkeypatch)
    config = LaunchConfig(
        block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3, splits=2, pdl=True
    )

    assert "ACQBULK" in opcodes(tile_code(module, tmp_path, 2, config))


@pytest.mark.parametrize(("bits", "kind"), [(4, "fp16"), (3, "bf16")])
def test_half_activations_use_tensor_cores_without_spills(monkeypatch, tmp_path, bits, kind):
    module = compiled(
        ["field_codes", "unpack", "split_sum", "half_codes", "half_linear"], monkeypatch
    )
    types = {
        "x_ptr": f"*{kind}", "x_sums_ptr": "*fp32", "w0_ptr": "*i16", "w1_ptr": "*i16",
        "w2_ptr": "*i16", "w_scale_ptr": "*fp16", "w_zero_ptr": "*i32", "bias_ptr": "*fp16",
        "out_ptr": f"*{kind}", "partial_ptr": "*fp32", "arrivals_ptr": "*i32",
    }  # fmt: skip
    config = module.half_configs(bits=bits, m=1, n=22016, columns=4096)[0]
    constants = {
        **widths(bits), "BITS": bits, "SLICE": 128, "STORED_N": 64, "GROUP_SLICES": 0,
        "MULTIPLIER": 1, "HAS_BIAS": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "SPLITS": config.splits, "INTERP": False,
    }  # fmt: skip
    kernel = module._half_kernel  # noqa: SLF001  what the launcher launches

    code = compile_kernel(
        kernel, types, constants, tmp_path,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    loop = product_loop(code)
    weights = weights_of_a_turn(bits, config.block_n, config.block_k, config.num_warps)
    assert not spills(opcodes(code))
    assert any(op.startswith(("HGMMA", "HMMA")) for op in loop)
    assert loop.total() / weights <= BUDGET[bits]


def descriptor(kind, block, width):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8, rank=len(block))
    return f"tensordesc<{kind}{list(block)},{layout!r}>"


def result_descriptor(tokens, outputs):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return f"tensordesc<bf16{[tokens, outputs]},{layout!r}>"


@pytest.mark.parametrize("bits", [3, 4])
def test_prefill_unpacks_while_a_product_is_under_way(monkeypatch, tmp_path, bits):
    module = compiled(["field_codes", "_prefill_results", "prefill_linear"], monkeypatch)
    fields = field_widths(bits)
    turn = 8 // fields[-1]
    config = next(each for each in prefill_configs(fields, 128) if each.staged)
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
    kernel = module._prefill_kernel  # noqa: SLF001  what the launcher launches

    code = compile_kernel(
        kernel, types, constants, tmp_path, gluon=True, num_warps=config.num_warps
    )

    loop = product_loop(code)
    products = turn * config.block_n // (16 * config.num_warps) * config.block_k // 32
    assert sum(n for op, n in loop.items() if op.startswith("IGMMA")) == products
    assert sum(n for op, n in loop.items() if op.startswith("UTMALDG")) == 1 + len(fields)
    assert not spills(loop)
    # results leave by a copy, not by the threads
    assert any("UTMASTG" in line for line in code.splitlines())
    assert any("ACQBULK" in line for line in code.splitlines()), "it waits for the tokens"
    # every wait leaves one product under way
    waits = [line for line in code.splitlines() if "WARPGROUP.DEPBAR" in line]
    assert sum("0x1" in line.split("DEPBAR")[1] for line in waits) == turn
