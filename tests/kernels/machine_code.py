"""What a Triton or Gluon kernel becomes on a GPU that need not be here: compile and count.

The compiler and the disassembler come with Triton; only a launch needs the GPU. Compiling happens
in a process of its own: where `TRITON_INTERPRET` is set, Triton's own library (`tl.sum`,
`tl.zeros`) was imported for the interpreter and can no longer be compiled.
"""

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

__all__ = ["MachineCode", "compile_kernel"]

HOPPER = 90
ALIGNMENT = 16
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
LABEL = re.compile(r"(\.L_x_\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """Opcodes of one compiled kernel, with their suffixes: LDG.E.128, BMMA.168256.AND.POPC."""

    instructions: tuple[tuple[str, str], ...]
    """Opcode and operands, in the order of addresses."""
    loops: tuple[range, ...]
    """Positions of every loop, found by its backward branch, longest first."""
    shared_bytes: int

    def count(self, *prefixes):
        """Instructions of the whole kernel whose opcode starts with one of the prefixes."""
        return _count(self.opcodes, prefixes)

    def count_in_loop(self, *prefixes):
        """The same of the longest loop; of all its instructions where no prefix is given."""
        return _count(self.loop_opcodes, prefixes or ("",))

    @property
    def opcodes(self):
        """Number of times each opcode is in the whole kernel."""
        return Counter(opcode for opcode, _ in self.instructions)

    @property
    def loop_opcodes(self):
        longest = self.loops[0] if self.loops else range(0)
        return Counter(self.instructions[position][0] for position in longest)

    @property
    def product_loop(self):
        """Opcodes of the shortest loop that holds a matrix instruction."""
        loops = [Counter(self.instructions[at][0] for at in loop) for loop in self.loops]
        return min((loop for loop in loops if any("MMA" in op for op in loop)), key=Counter.total)

    @property
    def spills(self):
        """Accesses of local memory: what did not fit into registers."""
        return self.count("LDL", "STL")


def compile_kernel(
    module, kernel, *, types, constants=None, unaligned=(), capability=HOPPER, **options
):
    """Compile a jitted kernel and read its machine code.

    Args:
        module: where the kernel is, "kernels.int_linear".
        kernel: its name there.
        types: run-time arguments, "*i8" for a pointer, "fp32" for a number. Others that the
            kernel has are "i32", those that it has not are ignored.
        constants: values of the constexpr arguments.
        unaligned: run-time arguments that are no multiples of 16; a launcher takes every tensor
            that torch allocated, and every size that divides by 16, as one.
        capability: 90 for sm_90.
        options: `num_warps`, `num_stages`, `maxnreg`, ...; products are rounded before sums
            unless `enable_fp_fusion` says otherwise.
    """
    options = {"enable_fp_fusion": False} | options
    target = GPUTarget("cuda", capability, 32)
    job = ((module, kernel), types, constants or {}, unaligned, target, options)
    text, shared_bytes = _compiler().submit(_compile, *job).result()
    return _read(text, shared_bytes)


@cache
def _compiler():
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        pool.submit(int).result()  # the process starts with its first job
    return pool


def _compile(place, types, constants, unaligned, target, options):
    module, name = place
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    aligned = [
        name
        for name, kind in signature.items()
        if name not in unaligned and kind.startswith(("*", "i", "u"))
    ]
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in aligned}
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text, compiled.metadata.shared


def _read(text, shared_bytes):
    labels, instructions = {}, []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction.groups())
    loops = []
    for end, (opcode, operands) in enumerate(instructions):
        goal = LABEL.search(operands) if opcode.startswith("BRA") else None
        # the branch to itself at the end of every kernel is no loop
        if goal and labels.get(goal.group(1), end) < end:
            loops.append(range(labels[goal.group(1)], end + 1))
    loops.sort(key=len, reverse=True)
    return MachineCode(
        instructions=tuple(instructions), loops=tuple(loops), shared_bytes=shared_bytes
    )


def _count(opcodes, prefixes):
    return sum(number for opcode, number in opcodes.items() if opcode.startswith(tuple(prefixes)))
