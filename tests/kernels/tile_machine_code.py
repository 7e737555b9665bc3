"""Kernels compiled for an H100 without one, and the instructions of the loop that multiplies."""

import re
import subprocess
from collections import Counter

import triton

# the compiler imports it with the first kernel, and it looks at TRITON_INTERPRET then
import triton.experimental.gluon
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)")
LABEL = re.compile(r"(\.L_x_\d+)")


def compile_kernel(kernel, types, constants, tmp_path, *, gluon=False, **options):
    """Return the machine code; every pointer, stride and padded size is taken as aligned."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    aligned = [
        name for name, kind in signature.items()
        if kind.startswith("*") or name.startswith("stride") or name in ("NP", "N")
    ]  # fmt: skip
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, values, attributes)
    options = {"enable_fp_fusion": False, **options}
    compiled = triton.compile(source, target=HOPPER, options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def opcodes(text):
    """Count the whole kernel's instructions."""
    matches = (INSTRUCTION.match(line) for line in text.splitlines())
    return Counter(match.group(1) for match in matches if match)


def product_loop(text):
    """Count the instructions of the shortest loop that holds a matrix instruction."""
    lines, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label.group(1)] = len(lines)
        elif match := INSTRUCTION.match(line):
            lines.append(match.groups())
    loops = []
    for end, (op, rest) in enumerate(lines):
        target = LABEL.search(rest) if op.startswith("BRA") else None
        if target and labels.get(target.group(1), end) < end:
            loop = Counter(op for op, _ in lines[labels[target.group(1)] : end + 1])
            if any("MMA" in op for op in loop):
                loops.append(loop)
    return min(loops, key=lambda loop: loop.total())


def spills(counts):
    return {op: n for op, n in counts.items() if op.startswith(("LDL", "STL"))}
