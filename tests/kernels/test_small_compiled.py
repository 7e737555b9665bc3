"""What the small fused kernels become on an H100, read from the machine code; no GPU needed."""

import pytest
import triton

from kernels.token_parts import register_options, share_of
from tests.kernels.machine_code import compile_kernel

SHARED_MEMORY = 227 * 1024
TYPES = {
    "x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16",
    "out_ptr": "*bf16", "total_ptr": "*bf16", "eps": "fp32", "factor": "fp32",
    "scale_ptr": "*fp32", "zero_ptr": "*i32", "sums_ptr": "*i32", "cos_ptr": "*fp32",
    "sin_ptr": "*fp32", "positions_ptr": "*i64", "peaks_ptr": "*fp32", "temperature_ptr": "*fp32",
    "limit_ptr": "*fp32", "bases_ptr": "*i64", "count_limit_ptr": "*i32", "lowest_ptr": "*i64",
    "count_bases_ptr": "*i64", "count_sums_ptr": "*i64", "mass_bases_ptr": "*i64",
    "mass_sums_ptr": "*i64", "top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32",
    "slots_ptr": "*i64", "codes_ptr": "*i8", "left_ptr": "*fp32", "right_ptr": "*fp32",
    "seed_ptr": "*i64", "position_ptr": "*i32", "scores_ptr": "*fp32", "ids_ptr": "*i32",
}  # fmt: skip


def compiled(file, kernel, *, num_warps, types=None, options=None, **constants):
    code = compile_kernel(
        f"kernels.{file}", kernel,
        types=TYPES | (types or {}), constants=constants, unaligned=("M", "V", "W", "HEADS"),
        num_warps=num_warps, **(options or {}),
    )  # fmt: skip
    assert code.shared_bytes <= SHARED_MEMORY
    return code


def token_kernel(k, prologue, *, bits=8, groups=1, num_warps=16, parts=1):
    share = triton.next_power_of_2(k) if parts == 1 else share_of(k, parts, k // groups % k)
    return compiled(
        "_token_kernel", "token_kernel", num_warps=num_warps,
        types={"out_ptr": "*i8" if bits else "*bf16"}, options=register_options(parts, num_warps),
        K=k, L=k, GROUPS=groups, BITS=bits, PROLOGUE=prologue, NORM=prologue == "rms",
        HAS_RESIDUAL=prologue == "rms", BLOCK=triton.next_power_of_2(share), PARTS=parts,
        SHARE=share, RAPID=True, NATIVE_EXP=False, PDL=True, INTERP=False,
    )  # fmt: skip


def test_a_norm_reads_wide_once_and_its_threads_meet_three_times():
    code = token_kernel(4096, "rms")

    assert code.count("LDG.E.128") == code.count("LDG") == 3
    assert not code.spills
    # each meeting is one exchange of partial results; the range's has two of them
    assert code.count("STS") <= 4
    assert code.count("BAR") <= 6
    # eight values a thread
    assert len(code.instructions) <= 640
    assert code.opcodes["ACQBULK"] == code.opcodes["PREEXIT"] == 1


@pytest.mark.parametrize(("k", "groups"), [(11008, 1), (28672, 1), (14336, 112)])
def test_a_gate_stays_in_registers_for_the_widest_models(k, groups):
    code = token_kernel(k, "silu", groups=groups)

    assert code.count("LDG.E.128") == code.count("LDG")
    assert not code.spills
    values = triton.next_power_of_2(k) / 512
    assert len(code.instructions) / values <= 60


@pytest.mark.parametrize(
    ("k", "parts", "num_warps", "groups"),
    [(28672, 16, 8, 1), (14336, 16, 4, 112)],
)
def test_parts_of_a_gate_ask_for_everything_first_and_wait_without_a_barrier(
    k, parts, num_warps, groups
):
    code = token_kernel(k, "silu", groups=groups, num_warps=num_warps, parts=parts)

    assert not code.spills
    assert code.count("LDG.E.128") == 2
    opcodes = [opcode for opcode, _ in code.instructions]
    # gates and ups are asked for together, before the first exponential
    assert opcodes[: opcodes.index("MUFU.RCP")].count("LDG.E.128") == 2
    assert_parts_meet_once(code, adds=groups == 1)
    # eight values a thread
    assert len(code.instructions) <= 800


def assert_parts_meet_once(code, *, adds=True):
    # no fence: a range is published by one store and taken by one load
    assert not code.count("MEMBAR.SC.GPU", "MEMBAR.ALL.GPU", "CCTL")
    assert code.count("ATOMG.E.EXCH.64") == 1
    assert code.count("REDG.E.ADD") == adds
    [wait] = [loop for loop in code.loops if "LDG.E.64.STRONG.GPU" in opcodes_of(code, loop)]
    assert opcodes_of(code, wait).count("LDG.E.64.STRONG.GPU") == 1
    assert not [each for each in opcodes_of(code, wait) if each.startswith("BAR")]
    assert len(wait) <= 8


def opcodes_of(code, loop):
    return [code.instructions[at][0] for at in loop]


def rotated_kernel(k, p, q, *, parts=1, num_warps=16, chunk=32, blocks=None, columns=None):
    blocks, columns = blocks or k // (p * q), columns or q
    return compiled(
        "rotated_tokens", "_rotated_kernel", num_warps=num_warps,
        options=register_options(parts, num_warps),
        K=k, L=k, P=p, Q=q, GROUPS=1, BITS=8, PROLOGUE="silu", PARTS=parts, BLOCKS=blocks,
        COLUMNS=columns, BLOCK_B=triton.next_power_of_2(blocks),
        BLOCK_P=triton.next_power_of_2(p), BLOCK_Q=triton.next_power_of_2(q),
        BLOCK_C=triton.next_power_of_2(columns), CHUNK=min(q, chunk), BLOCK_G=1, BLOCK_PAD=1,
        NATIVE_EXP=False, PDL=True, INTERP=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("k", "p", "q"), [(11008, 16, 16), (14336, 112, 128)], ids=["llama-7b", "llama-3-8b"]
)
def test_an_online_transform_uses_tensor_cores_without_spills(k, p, q):
    code = rotated_kernel(k, p, q)

    assert code.count("HGMMA")
    assert not code.spills


def test_parts_of_blocks_and_of_columns_use_tensor_cores_without_spills():
    blocks = rotated_kernel(11008, 16, 16, parts=16, num_warps=4, blocks=3)
    columns = rotated_kernel(14336, 112, 128, parts=8, num_warps=8, chunk=64, columns=16)

    for code in (blocks, columns):
        # the instruction of one program, so the order of its sums
        assert code.count("HGMMA")
        assert not code.count("HMMA")
        assert not code.spills
        assert_parts_meet_once(code)


def test_rotation_does_not_spill():
    code = compiled(
        "rotary", "_rotary_kernel", num_warps=4, HEAD_DIM=128, HALF=64, BLOCK_H=4, BLOCK_R=64,
        PDL=True, INTERP=False,
    )  # fmt: skip

    assert not code.spills
    assert len(code.instructions) <= 400


@pytest.mark.parametrize(("shift", "levels", "logits"), [(16, 4, "*bf16"), (0, 8, "*fp32")])
def test_sampling_does_not_spill(shift, levels, logits):
    digits = {
        "LEVELS": levels, "DIGIT_BITS": 4, "KEY_SHIFT": shift, "SLICE": 1024, "SPLITS": 128,
        "SLOTTED": True, "PDL": True, "num_warps": 4,
    }  # fmt: skip
    types = {"logits_ptr": logits}

    search = compiled(
        "_sampling_kernels", "search_kernel", types=types | {"sums_ptr": "*i64"},
        FIRST=False, MASS=True, AFTER_COUNT=True, BLOCK=256, **digits,
    )  # fmt: skip
    draw = compiled(
        "_sampling_kernels", "draw_kernel", types=types,
        HAS_COUNT=True, HAS_MASS=True, HAS_MIN_P=True, LANES=256, **digits,
    )  # fmt: skip

    for code in (search, draw):
        assert not code.spills


def test_rules_do_not_spill():
    names = ("is_penalized", "biases", "bias_ids", "ends", "end_ids", "is_guided", "masks")
    code = compiled(
        "token_rules", "_rules_kernel", num_warps=4,
        types={
            **{f"{name}_ptr": "*i32" for name in names}, "counts_ptr": "*i16",
            **{f"{name}_ptr": "*fp32" for name in ("repetition", "presence", "frequency", "out")},
            "bias_values_ptr": "*fp32", "ends_from_ptr": "*i64", "position_ptr": "*i64",
            "logits_ptr": "*bf16",
        },
        BIASES=1024, ENDS=64, BLOCK=2048,
    )  # fmt: skip

    assert not code.spills
    # what the tile became is stored before single tokens of it change
    assert code.count("BAR") >= 2


@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
def test_logprobs_do_not_spill(logits):
    types = {
        "logits_ptr": logits, "wanted_ptr": "*i32", "tokens_ptr": "*i32", "sums_ptr": "*fp32",
        "keys_ptr": "*i64", "chosen_ptr": "*fp32", "top_ptr": "*fp32", "top_ids_ptr": "*i32",
    }  # fmt: skip

    parts = compiled(
        "token_logprobs", "_slice_kernel", num_warps=8, types=types,
        SPLITS=64, TOP=20, LANES=32, SLICE=4096,
    )  # fmt: skip
    whole = compiled(
        "token_logprobs", "_merge_kernel", num_warps=4, types=types,
        SPLITS=64, PARTS=64, TOP=20, LANES=32,
    )  # fmt: skip

    for code in (parts, whole):
        assert not code.spills
