"""What the key-value kernels become on an H100, read from the machine code; no GPU needed."""

import pytest

from kernels.token_parts import register_options
from tests.kernels.machine_code import compile_kernel

POINTERS = {
    "q_ptr": "*bf16", "query_ptr": "*bf16", "key_ptr": "*bf16", "value_ptr": "*bf16",
    "out_ptr": "*bf16", "like_ptr": "*bf16", "scale_ptr": "*fp32",
    "cos_ptr": "*fp32", "sin_ptr": "*fp32",
    "query_norm_ptr": "*bf16", "key_norm_ptr": "*bf16", "query_eps": "fp32", "key_eps": "fp32",
    "parts_ptr": "*fp32", "sums_ptr": "*fp32", "positions_ptr": "*i32", "slots_ptr": "*i32",
    "table_ptr": "*i32", "lengths_ptr": "*i32", "starts_ptr": "*i32", "softmax_scale": "fp32",
    "soft_cap": "fp32",
}  # fmt: skip
PACKED = {"codes_ptr": "*i16", "zero_ptr": "*i32"}
BYTES = {"codes_ptr": "*u8", "zero_ptr": "*u8"}
CODES = {"codes_ptr": "*i8", "zero_ptr": "*i32", "code_sums_ptr": "*i32", "slots_ptr": "*i64"}
SIZES = ("query_heads", "query_blocks", "kv_blocks", "window", "GROUP", "head_blocks", "batch")
SHAPE = {"KV_HEADS": 8, "HEAD_DIM": 128, "PAGE": 16, "HAS_WINDOW": False, "HAS_CAP": False,
         "PDL": False, "INTERP": False}  # fmt: skip
DECODE = SHAPE | {"SPLITS": 8, "MIN_CHUNK": 128, "BLOCK_G": 16, "AHEAD": 2, "PDL": True}
PREFILL = SHAPE | {"GROUP": 4, "BLOCK_B": 8, "BLOCK_M": 128, "BLOCK_T": 64}
APPEND = {"KV_HEADS": 8, "PAGE": 16, "BITS": 4, "FIELD": 4, "WIDTH": 64, "ROTATED": 128,
          "NORM": "none", "BLOCK_D": 128, "PDL": False, "MIN_SCALE": 1e-5,
          "BLOCK_H": 2, "BLOCK_C": 64, "INTERP": False}  # fmt: skip
COMBINE = {"HEADS": 32, "HEAD_DIM": 128, "L": 4096, "GROUPS": 1, "BITS": 8, "HAS_WINDOW": False,
           "MIN_CHUNK": 128, "BLOCK_T": 128, "BLOCK_D": 128, "BLOCK_G": 1, "BLOCK_PAD": 1,
           "PDL": True, "INTERP": False}  # fmt: skip
ALONE = COMBINE | {"PARTS": 1, "SHARE": 32, "BLOCK_H": 32, "SPLITS": 8, "BLOCK_S": 8, "UNROLL": 4}
SHARED = COMBINE | {"PARTS": 32, "SHARE": 1, "BLOCK_H": 1, "SPLITS": 16, "BLOCK_S": 16,
                    "UNROLL": 16}  # fmt: skip


def packed(bits, width):
    return {"BITS": bits, "FIELD": bits, "WIDTH": width, "BLOCK_W": width}


def compiled(file, kernel, constants, codes, **options):
    return compile_kernel(
        f"kernels.{file}", kernel,
        types=POINTERS | codes, constants=constants, unaligned=SIZES, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    """Machine code by kernel and bits."""
    fused = {"enable_fp_fusion": True}
    return {
        "decode 4": compiled(
            "paged_attention", "_decode_kernel", DECODE | packed(4, 32) | {"BLOCK_T": 128}, PACKED,
            num_warps=4, num_stages=3, **fused,
        ),
        "decode 2": compiled(
            "paged_attention", "_decode_kernel", DECODE | packed(2, 16) | {"BLOCK_T": 32}, PACKED,
            num_warps=1, num_stages=3, **fused,
        ),
        "prefill 4": compiled(
            "paged_prefill", "_prefill_kernel", PREFILL | packed(4, 32), PACKED,
            num_warps=8, num_stages=2, **fused,
        ),
        "append 4": compiled("_kv_append_kernel", "append_kv_kernel", APPEND, BYTES, num_warps=1),
        "append 4 normed": compiled(
            "_kv_append_kernel", "append_kv_kernel", APPEND | {"NORM": "rms", "PDL": True}, BYTES,
            num_warps=1,
        ),
        "combine 8": compiled(
            "attended_tokens", "_combine_tokens_kernel", ALONE, CODES, num_warps=8,
        ),
        "combine shared": compiled(
            "attended_tokens", "_combine_tokens_kernel", SHARED, CODES, num_warps=1,
            **register_options(32, 1),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kernel",
    [
        "decode 4", "decode 2", "prefill 4", "append 4", "append 4 normed", "combine 8",
        "combine shared",
    ],
)  # fmt: skip
def test_no_register_is_spilled(kernels, kernel):
    assert not kernels[kernel].spills


@pytest.mark.parametrize("kernel", ["decode 4", "decode 2"])
def test_decode_unpacks_in_registers_between_wide_copies_and_tensor_cores(kernels, kernel):
    code = kernels[kernel]

    assert code.opcodes["LDGSTS.E.BYPASS.128"] >= 8
    assert code.count("LDSM") >= 10
    # two codes an instruction: 64 products of 16 x 16 operands, four registers of two codes each
    assert code.opcodes["HMMA.16816.F32"] == 64
    assert code.opcodes["HFMA2"] + code.count("HFMA2.MMA") <= 160


# all of the kernel; a turn of either loop takes about 870 for 256 codes a lane
@pytest.mark.parametrize(("kernel", "budget"), [("decode 4", 1900), ("decode 2", 2700)])
def test_decode_stays_within_its_instructions(kernels, kernel, budget):
    assert len(kernels[kernel].instructions) <= budget


@pytest.mark.parametrize("kernel", ["decode 4", "decode 2"])
def test_decode_asks_for_its_chunk_before_the_kernel_ahead_has_ended(kernels, kernel):
    opcodes = [opcode for opcode, _ in kernels[kernel].instructions]
    asked = [at for at, opcode in enumerate(opcodes) if opcode.startswith("CCTL")]
    wait = opcodes.index("ACQBULK")
    read = [at for at, opcode in enumerate(opcodes) if opcode.startswith("LDGSTS")]

    assert len(asked) >= 10
    assert max(asked) < wait < min(read)


def test_prefill_multiplies_on_warpgroups(kernels):
    assert kernels["prefill 4"].count("HGMMA") >= 12
    assert kernels["prefill 4"].count("LDGSTS") >= 4


def test_appending_reads_sixteen_bytes_at_a_time(kernels):
    assert kernels["append 4"].count("LDG.E.128") >= 3


def test_combining_has_the_loads_of_four_chunks_under_way(kernels):
    # four chunks of sixteen values a thread, four values a load
    assert kernels["combine 8"].count("LDG.E.128") >= 16


def test_a_part_that_combines_asks_for_every_chunk_before_it_weighs_one(kernels):
    opcodes = [opcode for opcode, _ in kernels["combine shared"].instructions]
    weighs = next(at for at, opcode in enumerate(opcodes) if opcode.startswith("MUFU.EX2"))

    assert opcodes[:weighs].count("LDG.E.128") == 16
    assert not kernels["combine shared"].count("BAR.SYNC")
