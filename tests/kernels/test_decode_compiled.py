"""What the decode kernel becomes on an H100, read from the machine code; no GPU needed."""

import dataclasses
import re
import subprocess

import pytest
import triton

# the compiler imports it with the first kernel, and it looks at TRITON_INTERPRET then, which the
# fixture has changed by that time
import triton.experimental.gluon
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.decode_config import LaunchConfig, decode_configs, select_config
from kernels.sliced import field_widths
from tests.kernels.conftest import load_kernel_module

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)")
SLOTS_PER_BIT = 1.23
"""Issue slots that a weight's bit leaves at memory speed (kernels.md 3.3)."""
POINTERS = {
    "x_ptr": "*i32", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sums_ptr": "*i32",
    "w0_ptr": "*i32", "w1_ptr": "*i32", "w2_ptr": "*i32", "w_scale_ptr": "*fp16",
    "w_zero_ptr": "*i32", "zero_codes_ptr": "*u8", "w_sums_ptr": "*i32", "bias_ptr": "*bf16",
    "out_ptr": "*bf16", "partials_ptr": "*i32", "counters_ptr": "*i32",
}  # fmt: skip
ALIGNED = (*POINTERS, "stride_xm", "run_words", "stride_om", "stride_pm", "N")


@pytest.fixture
def kernel(monkeypatch):
    module = load_kernel_module("decode_linear", interpreted=False, monkeypatch=monkeypatch)
    return module._decode_linear_kernel  # noqa: SLF001  what the launcher launches


def lines_of(kernel, tmp_path, config, *, bits, k=4096, g=128, m=1, group=0):
    """Opcodes and operands in order, labels among them."""
    fields = (*field_widths(bits), 0, 0)
    constants = {
        "F0": fields[0], "F1": fields[1], "F2": fields[2], "MULTIPLIER": 1,
        "GROUPS": k // group if group else 1, "GROUP_SIZE": group or k, "HAS_BIAS": True,
        "BLOCK_ROWS": 64, "W": g // 4, "K_BLOCKS": k // (8 * g), "MP": m, "RT": config.thread_rows,
        "RL": config.lane_rows, "KB": config.turn_blocks, "SPLIT_K": config.split_k, "PDL": True,
        "INTERP": False,
    } | ({"M": 1} if m == 1 else {})  # fmt: skip
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {
        "num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False,
        "launch_pdl": True,
    }  # fmt: skip
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(triton.compile(source, target=HOPPER, options=options).asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            found.append(("LABEL", label.group(1)))
        elif (match := INSTRUCTION.match(line)) and match.group(1) != "NOP":
            found.append(match.groups())
    return found


def places(lines, start):
    return [i for i, (opcode, _) in enumerate(lines) if opcode.startswith(start)]


def loops(lines):
    """Every stretch from a label to a later branch back to it."""
    labels = {name: i for i, (opcode, name) in enumerate(lines) if opcode == "LABEL"}
    for end in places(lines, "BRA"):
        target = re.search(r"\.L_x_\d+", lines[end][1])
        start = labels.get(target.group(), end) if target else end
        if start < end - 1:
            yield lines[start:end]


def weights_of_a_thread(config, k):
    return config.rows * k / (32 * config.num_warps)


@pytest.mark.parametrize("bits", range(1, 9))
def test_it_reads_whole_lines_first_and_stays_within_the_budget(kernel, tmp_path, bits):
    config = select_config(bits=bits, n=22016, columns=4096, slice_bytes=128, m=1)

    lines = lines_of(kernel, tmp_path, config, bits=bits)

    weights = weights_of_a_thread(config, 4096)
    streamed = places(lines, "LDG.E.EF")
    assert places(lines, "LDG.E.EF.128") == streamed
    assert len(streamed) == weights * bits / 128
    # every weight is asked for before the kernel waits for its tokens
    assert streamed[-1] < places(lines, "ACQBULK")[0] < places(lines, "LDG.E.EL.128")[0]
    assert places(lines, "IDP.4A")
    assert not places(lines, "LDL") + places(lines, "STL")
    assert not list(loops(lines))
    assert len(lines) <= SLOTS_PER_BIT * bits * weights
    # activations go to the product as they are: barriers only join the warps' sums at the end
    assert not [i for i in places(lines, "BAR") if i < places(lines, "IDP.4A")[-1]]


@pytest.mark.parametrize("bits", [2, 7])
def test_turns_meet_no_barrier(kernel, tmp_path, bits):
    config = LaunchConfig(lane_rows=4, thread_rows=1, turn_blocks=8, num_warps=8)

    lines = lines_of(kernel, tmp_path, config, bits=bits, k=28672)

    (loop,) = loops(lines)
    assert len(places(loop, "LDG.E.EF.128")) == bits
    assert places(loop, "IDP.4A")
    assert not places(loop, "BAR") + places(lines, "LDL") + places(lines, "STL")
    weights = weights_of_a_thread(config, 8 * 1024)
    assert len(loop) <= SLOTS_PER_BIT * bits * weights


@pytest.mark.parametrize("bits", [2, 4])
def test_group_scales_stay_within_the_budget(kernel, tmp_path, bits):
    config = select_config(bits=bits, n=22016, columns=4096, slice_bytes=64, m=1, grouped=True)

    lines = lines_of(kernel, tmp_path, config, bits=bits, g=64, group=128)

    assert not places(lines, "LDL") + places(lines, "STL") + places(lines, "FFMA")
    assert len(lines) <= SLOTS_PER_BIT * bits * weights_of_a_thread(config, 4096)


@pytest.mark.parametrize(("bits", "m"), [(2, 4), (4, 8)])
def test_several_tokens_share_the_weights_without_spills(kernel, tmp_path, bits, m):
    config = select_config(bits=bits, n=22016, columns=4096, slice_bytes=128, m=m)

    lines = lines_of(kernel, tmp_path, config, bits=bits, m=m)

    per_turn = weights_of_a_thread(config, 4096) * bits / 128
    assert len(places(lines, "LDG.E.EF.128")) <= 2 * per_turn
    assert not places(lines, "LDL") + places(lines, "STL")


def test_splits_are_added_by_the_last_program(kernel, tmp_path):
    config = dataclasses.replace(
        decode_configs(bits=2, n=512, columns=4096, slice_bytes=128, m=1)[0],
        turn_blocks=2, num_warps=2, split_k=2,
    )  # fmt: skip

    lines = lines_of(kernel, tmp_path, config, bits=2)

    assert places(lines, "ATOMG")
    assert not places(lines, "LDL") + places(lines, "STL")
