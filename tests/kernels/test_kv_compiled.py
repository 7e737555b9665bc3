"""What the key-value kernels become on an H100, read from the machine code; no GPU needed."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def opcodes():
    """Counts of opcodes by kernel and bits."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.kernels.compile_kv"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout)


def count(opcodes, name):
    return sum(n for opcode, n in opcodes.items() if opcode.startswith(name))


@pytest.mark.parametrize(
    "kernel", ["decode 4", "decode 2", "prefill 4", "append 4", "append 4 normed", "combine 8"]
)
def test_no_register_is_spilled(opcodes, kernel):
    assert not count(opcodes[kernel], "LDL")
    assert not count(opcodes[kernel], "STL")


@pytest.mark.parametrize("kernel", ["decode 4", "decode 2"])
def test_decode_unpacks_in_registers_between_wide_copies_and_tensor_cores(opcodes, kernel):
    codes = opcodes[kernel]

    assert codes["LDGSTS.E.BYPASS.128"] >= 8
    assert count(codes, "LDSM") >= 10
    # two codes an instruction: 64 products of 16 x 16 operands, four registers of two codes each
    assert codes["HMMA.16816.F32"] == 64
    assert codes["HFMA2"] + count(codes, "HFMA2.MMA") <= 160


# all of the kernel; a turn of either loop takes about 870 for 256 codes a lane
@pytest.mark.parametrize(("kernel", "budget"), [("decode 4", 1900), ("decode 2", 2700)])
def test_decode_stays_within_its_instructions(opcodes, kernel, budget):
    assert sum(opcodes[kernel].values()) <= budget


def test_prefill_multiplies_on_warpgroups(opcodes):
    assert count(opcodes["prefill 4"], "HGMMA") >= 12
    assert count(opcodes["prefill 4"], "LDGSTS") >= 4


def test_appending_reads_sixteen_bytes_at_a_time(opcodes):
    assert count(opcodes["append 4"], "LDG.E.128") >= 3


def test_combining_has_the_loads_of_four_chunks_under_way(opcodes):
    # four chunks of sixteen values a thread, four values a load
    assert count(opcodes["combine 8"], "LDG.E.128") >= 16
