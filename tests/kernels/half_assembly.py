"""The PTX of products of 16-bit numbers, statement by statement on NumPy.

A register is an array whose last axis is the lanes of a warp. Products are exact and summed in
float64; what a product adds to is rounded once, as float32.
"""

import re

import numpy as np
import torch

__all__ = ["run_statements"]

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def run_statements(text, registers):
    """Run assembly on a dictionary of registers, which it changes."""
    for statement in re.findall(r"[^;]+;", text.strip("{} ")):
        name, _, rest = statement.strip(" ;").partition(" ")
        if name == ".reg":
            continue
        if name.startswith("mma"):
            _multiply(name, re.findall(r"\{(.*?)\}", rest), registers)
        elif name == "mov.b64":
            _move_pair(rest, registers)
        else:
            out, *inputs = (part.strip() for part in rest.split(","))
            values = [_value(each, registers) for each in inputs]
            registers[out] = OPERATIONS[name](*values)


def _value(name, registers):
    return registers[name] if name in registers else np.uint32(int(name, 0))


def _move_pair(text, registers):
    if match := re.fullmatch(r"\{(\w+), (\w+)\}, (\S+)", text):
        low, high, source = match.groups()
        both = registers[source].view(np.uint64)
        registers[low] = (both & 0xFFFFFFFF).astype(np.uint32)
        registers[high] = (both >> 32).astype(np.uint32)
    else:
        out, low, high = re.fullmatch(r"(\S+), \{(\w+), (\w+)\}", text).groups()
        high = registers[high].astype(np.uint64) << 32
        registers[out] = (registers[low].astype(np.uint64) | high).view(np.int64)


def _and_xor(a, b, c, table):
    assert table == 0x6A
    return (a & b) ^ c


def _permute(a, b, selector):
    both = np.stack([a, b], -1).view(np.uint8)
    chosen = [both[..., (int(selector) >> (4 * i)) & 7] for i in range(4)]
    return np.stack(chosen, -1).view(np.uint32)[..., 0]


def _fused_bfloat16(a, b, c):
    exact = _numbers(a, "bf16") * _numbers(b, "bf16") + _numbers(c, "bf16")
    rounded = torch.from_numpy(exact).bfloat16().view(torch.int16).numpy()
    return rounded.view(np.uint16).astype(np.uint32) @ np.array([1, 1 << 16], np.uint32)


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "mov.b32": lambda a: a,
    "lop3.b32": _and_xor,
    "prmt.b32": _permute,
    "fma.rn.bf16x2": _fused_bfloat16,
}


def _numbers(words, kind):
    """Both halves of every register, low half first: float64 ``[..., 2]``."""
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)
    if kind == "f16":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _multiply(name, lists, registers):
    """`mma.m16n8k16`: which lane holds what is in the PTX manual."""
    kind = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.(b?f16)\.f32", name
    )[1]
    out, a, b, c = ([part.strip() for part in each.split(",")] for each in lists)
    lanes = np.broadcast_shapes(*(np.shape(registers[each]) for each in (*a, *b)))
    A, B = np.zeros((*lanes[:-1], 16, 16)), np.zeros((*lanes[:-1], 8, 16))
    for i, each in enumerate(a):
        numbers = _numbers(np.broadcast_to(registers[each], lanes), kind)
        for half in range(2):
            A[..., G + 8 * (i % 2), 2 * T + 8 * (i // 2) + half] = numbers[..., half]
    for i, each in enumerate(b):
        numbers = _numbers(np.broadcast_to(registers[each], lanes), kind)
        for half in range(2):
            B[..., G, 2 * T + 8 * i + half] = numbers[..., half]
    products = A @ np.swapaxes(B, -1, -2)
    for i, (target, source) in enumerate(zip(out, c, strict=True)):
        added = products[..., G + 8 * (i // 2), 2 * T + i % 2] + registers[source]
        registers[target] = added.astype(np.float32)
