"""What the half decode kernel becomes on an H100, read from the machine code; no GPU needed."""

import pytest

from kernels.half_decode import HalfDecodeConfig, HalfDecodeShape, half_decode_configs
from kernels.sliced import field_widths
from tests.kernels.machine_code import compile_kernel

SLOTS_PER_BIT = 1.23
"""Issue slots that a weight's bit leaves at memory speed (kernels.md 3.3)."""
TYPES = {
    "x_ptr": "*i64", "stride_xm": "i32", "w0_ptr": "*i32", "w1_ptr": "*i32", "w2_ptr": "*i32",
    "run_words": "i32", "w_scale_ptr": "*fp16", "w_zero_ptr": "*i32", "zero_codes_ptr": "*u8",
    "bias_ptr": "*fp32", "out_ptr": "*fp16", "stride_om": "i32", "M": "i32", "N": "i32", "K": "i32",
}  # fmt: skip
GROUPED = {"w_scale_ptr": "*i64", "zero_codes_ptr": "*i32"}


def code_of(config, *, bits, is_half=False, k=4096, g=128, m=1, groups=1):
    fields = (*field_widths(bits), 0, 0)
    constants = {
        "F0": fields[0], "F1": fields[1], "F2": fields[2], "MULTIPLIER": 1, "GROUPS": groups,
        "HAS_BIAS": True, "IS_HALF": is_half, "BLOCK_ROWS": 64, "G": g, "COLUMNS": k,
        "EVEN_K": True, "ROW_TILES": config.row_tiles, "WARPS": config.warps,
        "STEPS": config.steps, "PDL": True,
    } | ({"M": 1} if m == 1 else {})  # fmt: skip
    types = TYPES | (GROUPED if groups > 1 else {}) | {"out_ptr": "*fp16" if is_half else "*bf16"}
    return compile_kernel(
        "kernels._half_decode_kernel", "half_decode_kernel",
        types={name: kind for name, kind in types.items() if name not in constants},
        constants=constants, unaligned=("M",), num_warps=config.warps, launch_pdl=True,
        maxnreg=config.max_registers,
    )  # fmt: skip


def places(code, start):
    return [i for i, (opcode, _) in enumerate(code.instructions) if opcode.startswith(start)]


def issued_a_weight(code, config, k):
    weights = 16 * config.row_tiles * k / (32 * config.warps)
    return (len(code.instructions) - code.count("NOP")) / weights


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("is_half", [False, True])
def test_it_asks_for_every_weight_before_it_waits_and_stays_within_the_budget(bits, is_half):
    # the fewest instructions outside of the product that registers allow
    config = HalfDecodeConfig(row_tiles=1, warps=8, steps=1)
    if bits < 4:
        config = HalfDecodeConfig(row_tiles=4 if bits == 1 else 1, warps=4, steps=2)

    code = code_of(config, bits=bits, is_half=is_half)

    streamed = places(code, "LDG.E.EF")
    assert streamed == places(code, "LDG.E.EF.128")
    assert len(streamed) == 2 * bits * config.row_tiles * config.steps
    assert streamed[-1] < places(code, "ACQBULK")[0] < places(code, "LDG.E.EL.128")[0]
    assert code.count("LDG.E.EL.128") == code.count("LDG.E.EL") == 16 * config.steps
    assert code.count("HMMA.16816.F32")
    assert not code.spills
    assert not code.loops
    # barriers only join the sums of the warps
    assert places(code, "BAR")[0] > places(code, "HMMA")[-1]
    # one bit of a bfloat16 takes a third more
    budget = SLOTS_PER_BIT * bits * (1.35 if bits == 1 and not is_half else 1)
    assert issued_a_weight(code, config, 4096) <= budget


@pytest.mark.parametrize("bits", [2, 7])
def test_turns_meet_no_barrier(bits):
    config = HalfDecodeConfig(row_tiles=1, warps=8, steps=1)

    code = code_of(config, bits=bits, k=28672)

    assert code.count_in_loop("LDG.E.EF.128") == code.count_in_loop("LDG.E.EF") == 2 * bits
    assert code.count_in_loop("HMMA")
    assert code.count_in_loop("BAR") == code.spills == 0
    assert code.count_in_loop() <= SLOTS_PER_BIT * bits * 256


@pytest.mark.parametrize("bits", [2, 4])
def test_group_scales_come_four_at_a_time_and_spill_nothing(bits):
    shape = HalfDecodeShape(bits=bits, n=4096, columns=4096, grouped=True)
    config = half_decode_configs(shape)[0]

    code = code_of(config, bits=bits, g=64, groups=32, m=8)

    assert not code.spills
    assert code.count("LDG.E.EF.128") == 2 * bits * config.row_tiles * config.steps
    assert issued_a_weight(code, config, 4096) <= 1.35 * SLOTS_PER_BIT * bits


@pytest.mark.parametrize("bits", [1, 3, 7])
def test_the_first_choice_spills_nothing(bits):
    config = half_decode_configs(HalfDecodeShape(bits=bits, n=22016, columns=4096))[0]

    assert not code_of(config, bits=bits, m=8).spills
