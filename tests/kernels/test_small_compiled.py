"""What the small fused kernels become on an H100, read from the machine code; no GPU needed."""

import collections
import re
import subprocess
import sys

import pytest
import triton

# as in `test_compiled`: it looks at TRITON_INTERPRET when it is imported
import triton.experimental.gluon
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.kernels.conftest import load_kernel_module

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
SCALARS = {"M": "i32", "V": "i32", "W": "i32", "HEADS": "i32", "eps": "fp32"}
POINTERS = {
    "scale_ptr": "*fp32", "zero_ptr": "*i32", "sums_ptr": "*i32", "cos_ptr": "*fp32",
    "sin_ptr": "*fp32", "positions_ptr": "*i64", "peaks_ptr": "*fp32", "temperature_ptr": "*fp32",
    "limit_ptr": "*fp32", "bases_ptr": "*i64", "count_limit_ptr": "*i32", "lowest_ptr": "*i64",
    "count_bases_ptr": "*i64", "count_sums_ptr": "*i64", "mass_bases_ptr": "*i64",
    "mass_sums_ptr": "*i64", "top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32",
    "slots_ptr": "*i64",
    "seed_ptr": "*i64", "position_ptr": "*i32", "scores_ptr": "*fp32", "ids_ptr": "*i32",
}  # fmt: skip


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile a kernel of a file for an H100 and count its instructions."""
    for library in (tl, tl.standard):
        for name, member in vars(library).copy().items():
            if isinstance(member, InterpretedFunction):
                monkeypatch.setattr(library, name, JITFunction(member.fn))

    shared = load_kernel_module("_token_kernel", interpreted=False, monkeypatch=monkeypatch)
    monkeypatch.setitem(sys.modules, "kernels._token_kernel", shared)

    def count(file, kernel, *, num_warps, pointers=None, **constants):
        module = load_kernel_module(file, interpreted=False, monkeypatch=monkeypatch)
        fn = getattr(module, kernel)
        known = SCALARS | POINTERS | (pointers or {})
        types = {
            name: "constexpr" if name in constants
            else known.get(name, "i32" if name.startswith("stride") else "*bf16")
            for name in fn.arg_names
        }  # fmt: skip
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(fn.arg_names)
            if name.endswith("_ptr") or name.startswith("stride")
        }
        values = {(fn.arg_names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        kernel = triton.compile(
            ASTSource(fn, types, values, aligned), target=HOPPER, options=options
        )
        assert kernel.metadata.shared <= SHARED_MEMORY
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", text)
        return collections.Counter(found)

    return count


def total(opcodes, prefix):
    return sum(n for opcode, n in opcodes.items() if opcode.startswith(prefix))


def token_kernel(compiled, k, prologue, *, bits=8, groups=1, num_warps=16):
    return compiled(
        "_token_kernel", "token_kernel", num_warps=num_warps,
        pointers={"out_ptr": "*i8" if bits else "*bf16"},
        K=k, L=k, GROUPS=groups, BITS=bits, PROLOGUE=prologue, NORM=prologue == "rms",
        HAS_RESIDUAL=prologue == "rms", BLOCK=triton.next_power_of_2(k), RAPID=True,
        NATIVE_EXP=False, PDL=True, INTERP=False,
    )  # fmt: skip


def test_a_norm_reads_wide_once_and_its_threads_meet_three_times(compiled):
    opcodes = token_kernel(compiled, 4096, "rms")

    assert total(opcodes, "LDG.E.128") == total(opcodes, "LDG") == 3
    assert not total(opcodes, "LDL")
    assert not total(opcodes, "STL")
    # each meeting is one exchange of partial results; the range's has two of them
    assert total(opcodes, "STS") <= 4
    assert total(opcodes, "BAR") <= 6
    # eight values a thread
    assert sum(opcodes.values()) <= 640
    assert opcodes["ACQBULK"] == opcodes["PREEXIT"] == 1


@pytest.mark.parametrize(("k", "groups"), [(11008, 1), (28672, 1), (14336, 112)])
def test_a_gate_stays_in_registers_for_the_widest_models(compiled, k, groups):
    opcodes = token_kernel(compiled, k, "silu", groups=groups)

    assert total(opcodes, "LDG.E.128") == total(opcodes, "LDG")
    assert not total(opcodes, "LDL")
    assert not total(opcodes, "STL")
    values = triton.next_power_of_2(k) / 512
    assert sum(opcodes.values()) / values <= 60


@pytest.mark.parametrize(
    ("k", "p", "q"), [(11008, 16, 16), (14336, 112, 128)], ids=["llama-7b", "llama-3-8b"]
)
def test_an_online_transform_uses_tensor_cores_without_spills(compiled, k, p, q):
    opcodes = compiled(
        "rotated_tokens", "_rotated_kernel", num_warps=16,
        pointers={
            "codes_ptr": "*i8", "left_ptr": "*fp32", "right_ptr": "*fp32", "factor": "fp32",
        },
        K=k, L=k, P=p, Q=q, GROUPS=1, BITS=8, PROLOGUE="silu",
        BLOCK_B=triton.next_power_of_2(k // (p * q)), BLOCK_P=triton.next_power_of_2(p),
        BLOCK_Q=q, CHUNK=min(q, 32), BLOCK=16384, NATIVE_EXP=False, PDL=True, INTERP=False,
    )  # fmt: skip

    assert total(opcodes, "HGMMA")
    assert not total(opcodes, "LDL")
    assert not total(opcodes, "STL")


def test_rotation_does_not_spill(compiled):
    opcodes = compiled(
        "rotary", "_rotary_kernel", num_warps=4, HEAD_DIM=128, HALF=64, BLOCK_H=4, BLOCK_R=64,
        PDL=True, INTERP=False,
    )  # fmt: skip

    assert not total(opcodes, "LDL")
    assert sum(opcodes.values()) <= 400


@pytest.mark.parametrize(("shift", "levels", "logits"), [(16, 4, "*bf16"), (0, 8, "*fp32")])
def test_sampling_does_not_spill(compiled, shift, levels, logits):
    digits = {
        "LEVELS": levels, "DIGIT_BITS": 4, "KEY_SHIFT": shift, "SLICE": 1024, "SPLITS": 128,
        "SLOTTED": True, "PDL": True, "num_warps": 4,
    }  # fmt: skip
    pointers = {"logits_ptr": logits}

    search = compiled(
        "_sampling_kernels", "search_kernel", pointers=pointers | {"sums_ptr": "*i64"},
        LEVEL=1, MASS=True, AFTER_COUNT=True, BLOCK=256, **digits,
    )  # fmt: skip
    draw = compiled(
        "_sampling_kernels", "draw_kernel", pointers=pointers,
        HAS_COUNT=True, HAS_MASS=True, HAS_MIN_P=True, LANES=256, **digits,
    )  # fmt: skip

    for opcodes in (search, draw):
        assert not total(opcodes, "LDL")
        assert not total(opcodes, "STL")


def test_rules_do_not_spill(compiled):
    names = ("is_penalized", "biases", "bias_ids", "ends", "end_ids", "is_guided", "masks")
    opcodes = compiled(
        "token_rules", "_rules_kernel", num_warps=4,
        pointers={
            **{f"{name}_ptr": "*i32" for name in names}, "counts_ptr": "*i16",
            **{f"{name}_ptr": "*fp32" for name in ("repetition", "presence", "frequency", "out")},
            "bias_values_ptr": "*fp32", "ends_from_ptr": "*i64", "position_ptr": "*i64",
        },
        BIASES=1024, ENDS=64, BLOCK=2048,
    )  # fmt: skip

    assert not total(opcodes, "LDL")
    assert not total(opcodes, "STL")
    # what the tile became is stored before single tokens of it change
    assert total(opcodes, "BAR") >= 2


@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
def test_logprobs_do_not_spill(compiled, logits):
    pointers = {
        "logits_ptr": logits, "wanted_ptr": "*i32", "tokens_ptr": "*i32", "sums_ptr": "*fp32",
        "keys_ptr": "*i64", "chosen_ptr": "*fp32", "top_ptr": "*fp32", "top_ids_ptr": "*i32",
    }  # fmt: skip

    parts = compiled(
        "token_logprobs", "_slice_kernel", num_warps=8, pointers=pointers,
        SPLITS=64, TOP=20, LANES=32, SLICE=4096,
    )  # fmt: skip
    whole = compiled(
        "token_logprobs", "_merge_kernel", num_warps=4, pointers=pointers,
        SPLITS=64, PARTS=64, TOP=20, LANES=32,
    )  # fmt: skip

    for opcodes in (parts, whole):
        assert not total(opcodes, "LDL")
        assert not total(opcodes, "STL")
