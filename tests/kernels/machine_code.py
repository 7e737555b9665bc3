"""What a Triton or Gluon kernel becomes on a GPU that need not be here: compile and count.

The compiler and the disassembler come with Triton; only a launch needs the GPU.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# the compiler imports gluon with its first kernel, and gluon looks at TRITON_INTERPRET then, which
# a fixture may have changed by that time
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

__all__ = ["HOPPER", "MachineCode", "compile_kernel"]

HOPPER = GPUTarget("cuda", 90, 32)
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
        return Counter(opcode for opcode, _ in self.instructions)

    @property
    def loop_opcodes(self):
        longest = self.loops[0] if self.loops else range(0)
        return Counter(self.instructions[position][0] for position in longest)

    @property
    def spills(self):
        """Accesses of local memory: what did not fit into registers."""
        return self.count("LDL", "STL")


def compile_kernel(kernel, *, types, constants=None, unaligned=(), target=HOPPER, **options):
    """Compile a jitted kernel and read its machine code.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made; not the interpreter's copy.
        types: run-time arguments, "*i8" for a pointer, "i32" for a number.
        constants: values of the constexpr arguments.
        unaligned: run-time arguments that are no multiples of 16; a launcher takes every tensor
            that torch allocated, and every size that divides by 16, as one.
        target: the GPU.
        options: `num_warps`, `num_stages`, `maxnreg`, ...; products are rounded before sums
            unless `enable_fp_fusion` says otherwise.
    """
    options = {"enable_fp_fusion": False} | options
    constants = constants or {}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", ALIGNMENT]]
        for name, kind in types.items()
        if name not in unaligned and not kind.startswith(("fp", "bf"))
    }
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    compiled = triton.compile(
        source(kernel, signature, values, aligned), target=target, options=options
    )
    return _read(_disassemble(compiled.asm["cubin"]), compiled.metadata.shared)


def _disassemble(cubin):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
