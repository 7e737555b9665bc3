"""What the decode kernel becomes on an H100, read from the machine code; no GPU needed."""

import dataclasses

import pytest

from kernels.decode_config import LaunchConfig, select_config
from kernels.sliced import field_widths
from tests.kernels.machine_code import compile_kernel

SLOTS_PER_BIT = 1.23
"""Issue slots that a weight's bit leaves at memory speed (kernels.md 3.3)."""
TYPES = {
    "x_ptr": "*i32", "stride_xm": "i32", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32",
    "x_sums_ptr": "*i32", "w0_ptr": "*i32", "w1_ptr": "*i32", "w2_ptr": "*i32", "run_words": "i32",
    "w_scale_ptr": "*fp16", "w_zero_ptr": "*i32", "zero_codes_ptr": "*u8", "w_sums_ptr": "*i32",
    "terms_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "stride_om": "i32",
    "partials_ptr": "*i32", "stride_pm": "i32", "counters_ptr": "*i32", "M": "i32", "N": "i32",
}  # fmt: skip
ONE_TURN = LaunchConfig(lane_rows=4, thread_rows=2, turn_blocks=4, num_warps=4)


def code_of(config, *, bits, k=4096, g=128, m=1, group=0):
    fields = (*field_widths(bits), 0, 0)
    constants = {
        "F0": fields[0], "F1": fields[1], "F2": fields[2], "MULTIPLIER": 1,
        "GROUPS": k // group if group else 1, "GROUP_SIZE": group or k,
        "WORD_GROUPS": 4 if group else 1, "HAS_BIAS": True,
        "BLOCK_ROWS": 64, "W": g // 4, "K_BLOCKS": k // (8 * g), "MP": m, "RT": config.thread_rows,
        "RL": config.lane_rows, "KB": config.turn_blocks, "SPLIT_K": config.split_k, "PDL": True,
        "INTERP": False,
    } | ({"M": 1} if m == 1 else {})  # fmt: skip
    types = TYPES | ({"w_scale_ptr": "*i64", "zero_codes_ptr": "*i32"} if group else {})
    registers = {"maxnreg": config.max_registers} if config.max_registers else {}
    return compile_kernel(
        "kernels._decode_kernel", "decode_linear_kernel",
        types={name: kind for name, kind in types.items() if name not in constants},
        constants=constants, unaligned=("M",),
        num_warps=config.num_warps, num_stages=1, launch_pdl=True, **registers,
    )  # fmt: skip


def places(code, start):
    return [i for i, (opcode, _) in enumerate(code.instructions) if opcode.startswith(start)]


def issued(code):
    return len(code.instructions) - code.count("NOP")


def weights_of_a_thread(config, k):
    return config.rows * k / (32 * config.num_warps)


@pytest.mark.parametrize("bits", range(1, 9))
def test_it_asks_for_every_weight_before_it_waits_and_stays_within_the_budget(bits):
    # the fewest instructions outside the product that a program of 16 rows allows
    config = dataclasses.replace(ONE_TURN, thread_rows=4 if bits == 1 else 2)

    code = code_of(config, bits=bits)

    weights = weights_of_a_thread(config, 4096)
    streamed = places(code, "LDG.E.EF")
    assert streamed == places(code, "LDG.E.EF.128")
    assert len(streamed) == weights * bits / 128
    assert streamed[-1] < places(code, "ACQBULK")[0] < places(code, "LDG.E.EL.128")[0]
    assert code.count("IDP.4A") >= weights / 4
    assert not code.spills
    assert not code.loops
    assert issued(code) <= SLOTS_PER_BIT * bits * weights
    # activations reach the product as they are: barriers only join the sums of the warps
    assert places(code, "BAR")[0] > places(code, "IDP.4A")[-1]


@pytest.mark.parametrize("bits", [2, 7])
def test_turns_meet_no_barrier(bits):
    config = dataclasses.replace(ONE_TURN, thread_rows=1, turn_blocks=8, num_warps=8)

    # fewer turns may be written out
    code = code_of(config, bits=bits, k=57344)

    assert code.count_in_loop("LDG.E.EF.128") == code.count_in_loop("LDG.E.EF") == bits
    assert code.count_in_loop("IDP.4A")
    assert code.count_in_loop("BAR") == code.spills == 0
    weights = weights_of_a_thread(config, 8 * 1024)
    assert code.count_in_loop() <= SLOTS_PER_BIT * bits * weights


@pytest.mark.parametrize("bits", [2, 4])
def test_group_scales_stay_within_the_budget(bits):
    config = select_config(bits=bits, n=22016, columns=4096, slice_bytes=64, m=1, grouped=True)

    code = code_of(config, bits=bits, g=64, group=128)

    weights = weights_of_a_thread(config, 4096)
    # a lane holds 32 weights of a row in a group, and four groups of a row in one word
    assert code.count("FFMA") == code.count("I2F") - 1 == weights / 32
    assert code.count("LDG.E.64") == weights / 128
    assert places(code, "LDG.E.64")[-1] < places(code, "ACQBULK")[0]
    # lanes, and what lies in shared memory, meet at the end
    assert min(places(code, "SHFL") + places(code, "STS")) > places(code, "IDP.4A")[-1]
    assert code.count("BAR") <= 2
    assert not code.spills
    assert issued(code) <= 0.75 * SLOTS_PER_BIT * bits * weights


@pytest.mark.parametrize(("bits", "m"), [(2, 4), (3, 2), (4, 8)])
def test_several_tokens_share_the_weights_without_spills(bits, m):
    config = select_config(bits=bits, n=22016, columns=4096, slice_bytes=128, m=m)

    code = code_of(config, bits=bits, m=m)

    turns = -(-4 // config.turn_blocks)
    loads = weights_of_a_thread(config, 4096) / turns * bits / 128
    assert code.count("LDG.E.EF") == code.count("LDG.E.EF.128") == loads * min(2, turns)
    assert not code.spills
    products = places(code, "IDP.4A")
    assert not [bar for bar in places(code, "BAR") if products[0] < bar < products[-1]]


@pytest.mark.parametrize(("thread_rows", "m"), [(1, 1), (2, 1), (4, 1), (2, 4)])
def test_rows_and_tokens_share_one_layout(thread_rows, m):
    config = dataclasses.replace(ONE_TURN, thread_rows=thread_rows)

    code = code_of(config, bits=2, m=m)

    # every 16 bytes of activations serve all tiles of rows
    assert code.count("LDG.E.EL.128") == code.count("LDG.E.EL") == 8 * m
    # shared memory joins the sums of the warps at the end and does nothing else
    assert code.count("BAR") <= 3
    assert places(code, "STS")[0] > places(code, "IDP.4A")[-1]


def test_splits_are_added_by_the_last_program():
    config = dataclasses.replace(ONE_TURN, turn_blocks=2, num_warps=2, split_k=2)

    code = code_of(config, bits=2)

    assert code.count("ATOMG")
    assert not code.spills
