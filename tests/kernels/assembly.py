"""The handful of PTX instructions that unpack codes, on arrays of 32-bit words."""

import re

import numpy as np
import torch


def run_assembly(text, words):
    """Return what inline assembly leaves in its output register."""
    registers = {f"${i + 1}": word.astype(np.uint64) for i, word in enumerate(words)}
    operations = {
        "shr.b32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "xor.b32": lambda a, b: a ^ b,
        "add.u32": lambda a, b: a + b,
        "mov.b32": lambda a: a,
        "sub.f16x2": lambda a, b: lanes(a, torch.float16) - lanes(b, torch.float16),
        "fma.rn.bf16x2": lambda a, b, c: (
            lanes(a, torch.bfloat16) * lanes(b, torch.bfloat16) + lanes(c, torch.bfloat16)
        ),
    }
    for step in re.findall(r"[^;{}]+;", text):
        name, *rest = step.strip(" ;").replace(",", " ").split()
        if name == ".reg":
            continue
        values = [
            registers[r] if r in registers else np.full_like(registers["$1"], int(r, 0))
            for r in rest[1:]
        ]
        result = operations[name](*values)
        registers[rest[0]] = result if isinstance(result, torch.Tensor) else result & 0xFFFFFFFF
    return registers["$0"]


def lanes(words, dtype):
    return torch.from_numpy(words.astype(np.uint32).view(np.int16)).view(dtype).double()
