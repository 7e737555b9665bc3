"""Run Gluon kernels that multiply by whole warps on NumPy, as Gluon has no interpreter.

The kernel's file is executed as Python with stand-ins for `gluon` and `gl`: a tensor is an array
of all its elements, and an instruction in inline assembly acts on its last two axes, lane and
word, register by register as the PTX manual lays them out. Reads outside of an array fail, shared
memory holds garbage until a copy lands, and copies land as late or as early as they may.
"""

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch

from tests.kernels.half_assembly import run_statements

KERNELS = Path(__file__).parents[2] / "kernels"
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


class Tensor(np.ndarray):
    def __iadd__(self, other):
        # a name is bound anew; what else holds the old value keeps it
        return self + other

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


class Pointer:
    def __init__(self, array, offsets=0):
        self.array, self.offsets = array, offsets
        self.dtype = SimpleNamespace(element_ty=array.dtype)

    def __add__(self, offsets):
        return Pointer(self.array, self.offsets + offsets)

    def to(self, dtype):
        return self

    def places(self, mask):
        offsets, mask = np.broadcast_arrays(self.offsets, True if mask is None else mask)
        reached = offsets[mask]
        assert not reached.size or (reached.min() >= 0 and reached.max() < self.array.size)
        return np.where(mask, offsets, 0), mask


class Shared:
    def __init__(self, array):
        self.array = array

    def index(self, position):
        return Shared(self.array[position])

    def slice(self, start, length):
        return Shared(self.array[start : start + length])

    def load(self, layout):
        return self.array.copy().view(Tensor)


class Copies:
    """`async_copy`: groups land when they are waited for, or when they start."""

    def __init__(self, early):
        self.early, self.open, self.groups = early, [], []

    def async_load(self, shared, pointer, mask=None):
        self.open.append((shared, pointer, mask))
        if self.early:
            self.land(self.open)

    def async_copy_global_to_shared(self, *args):
        raise RuntimeError("renamed")

    def commit_group(self):
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding):
        while len(self.groups) > outstanding:
            self.land(self.groups.pop(0))

    def land(self, copies):
        for shared, pointer, mask in copies:
            shared.array[...] = load(pointer, mask, 0)


def load(pointer, mask=None, other=None, eviction_policy=None):
    places, mask = pointer.places(mask)
    # what is not asked for may be anything
    other = np.frombuffer(b"\x5a" * 8, pointer.array.dtype)[0] if other is None else other
    loaded = np.where(mask, pointer.array.ravel()[places], pointer.array.dtype.type(other))
    return loaded.view(Tensor)


def store(pointer, value, mask=None):
    places, mask = pointer.places(mask)
    value = np.broadcast_to(value, places.shape)
    assert value.dtype == pointer.array.dtype
    pointer.array.reshape(-1)[places[mask]] = value[mask]


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    if asm.startswith(("griddepcontrol", "prefetch")):
        # lines that are brought must exist
        _ = [each.places(None) for each in args]
        return None
    words = [*np.broadcast_arrays(*args)]
    if "l" in constraints:
        return _run_half(asm, constraints.count("="), words, dtype)
    assert not is_pure
    assert pack == 4
    registers = dict(enumerate(np.moveaxis(np.concatenate(words, -1), -1, 0), start=4))
    if "shfl" in asm or "mma" not in asm:
        return _sum_over_lanes(asm, registers)
    if isinstance(dtype, tuple):
        return _mma_beside_rotation(asm, np.concatenate(words, -1))
    lists = [[int(r) for r in re.findall(r"\d+", group)] for group in re.findall(r"{(.*?)}", asm)]
    a, b, c = ([registers[r] for r in group] for group in lists[1:])
    assert len(b) == {"m16n8k256": 2, "m16n8k128": 1}[re.search(r"m\d+n\d+k\d+", asm)[0]]
    return _mma(a, b, c)


def _mma_beside_rotation(asm, words):
    """Run what has two results in the order of its text: a register may be written too early."""
    registers = dict(enumerate(np.moveaxis(words, -1, 0), start=8))
    for statement in filter(None, asm.split(";")):
        operands = [int(r) for r in re.findall(r"\$(\d+)", statement)]
        if statement.startswith("mma"):
            a, b, c = operands[4:8], operands[8:10], operands[10:]
            product = _mma(*([registers[r] for r in part] for part in (a, b, c)))
            registers |= dict(zip(operands[:4], np.moveaxis(product, -1, 0), strict=True))
            continue
        opcode, bits = statement.split()[0], int(statement.rpartition(",")[2].lstrip("$"))
        value = registers[operands[1]]
        if opcode == "shf.l.wrap.b32":
            assert operands[1] == operands[2]
            unsigned = value.view(np.uint32)
            value = (unsigned << bits | unsigned >> (32 - bits)).view(np.int32)
        else:
            assert opcode == "mov.b32"
        registers[operands[0]] = value
    return tuple(
        np.stack([registers[r] for r in part], -1).view(Tensor)
        for part in ((0, 1, 2, 3), (4, 5, 6, 7))
    )


def _run_half(asm, outputs, words, dtype):
    """Run what the half kernel writes: on every element, or on the four words of a lane."""
    parts = [[word] if outputs == 1 else np.moveaxis(word, -1, 0) for word in words]
    registers = {
        f"${i}": _as_register(part) for i, part in enumerate(itertools.chain(*parts), start=outputs)
    }
    run_statements(asm, registers)
    if outputs == 1:
        return registers["$0"].astype(dtype).view(Tensor)
    return np.stack([registers[f"${i}"] for i in range(outputs)], -1).astype(dtype).view(Tensor)


def _as_register(array):
    array = np.ascontiguousarray(array).view(np.ndarray)
    return array.view(np.uint32) if array.dtype == np.int32 else array


def _mma(a, b, c):
    columns = 4 * len(b)
    A = np.zeros((*a[0].shape[:-1], 16, columns), np.uint32)
    B = np.zeros((*a[0].shape[:-1], 8, columns), np.uint32)
    for register, (half, row) in enumerate(itertools.product(range(len(b)), range(2))):
        A[..., G + 8 * row, T + 4 * half] = a[register].view(np.uint32)
    for register in range(len(b)):
        B[..., G, T + 4 * register] = b[register].view(np.uint32)
    both = A[..., :, None, :] & B[..., None, :, :]
    counts = np.bitwise_count(both).sum(-1, dtype=np.int32)
    places = [(G, 2 * T), (G, 2 * T + 1), (G + 8, 2 * T), (G + 8, 2 * T + 1)]
    result = [c[i] + counts[..., row, column] for i, (row, column) in enumerate(places)]
    return np.stack(result, -1).view(Tensor)


def _sum_over_lanes(asm, registers):
    pairs = [registers[4] + registers[5], registers[6] + registers[7]]
    for distance in re.findall(r"bfly\.b32 t, a, (\d),", asm):
        pairs = [pair + pair[..., LANE ^ int(distance)] for pair in pairs]
    return np.stack([pairs[0], pairs[0], pairs[1], pairs[1]], -1).view(Tensor)


def allocate_shared_memory(dtype, shape, layout):
    return Shared(np.full(shape, 0x55555555, dtype))


def _language(program):
    def full(shape, value, dtype, layout=None):
        return np.full(shape, value, dtype).view(Tensor)

    return SimpleNamespace(
        constexpr=lambda value: value,
        int16=np.int16, int32=np.int32, int64=np.int64, uint32=np.uint32,
        float16=np.float16, float32=np.float32, minimum=np.minimum,
        BlockedLayout=lambda *parts: None, SliceLayout=lambda *parts: None,
        SwizzledSharedLayout=lambda *parts: None, static_range=range, load=load, store=store,
        allocate_shared_memory=allocate_shared_memory, full=full,
        arange=lambda start, end, layout: np.arange(start, end, dtype=np.int32).view(Tensor),
        expand_dims=np.expand_dims, reshape=np.reshape, permute=np.transpose,
        convert_layout=lambda x, layout: x, join=lambda a, b: np.stack([a, b], -1),
        where=lambda *args: np.where(*args).view(Tensor),
        sum=lambda x, axis: np.sum(x, axis, dtype=x.dtype),
        program_id=lambda axis: np.array(program[axis], np.int32).view(Tensor),
        inline_asm_elementwise=inline_asm_elementwise,
    )  # fmt: skip


class EmulatedKernel:
    """Launched as a jitted kernel is; runs every program in turn."""

    def __init__(self, name, *, early=False, file="_binary_linear_kernel.py"):
        self.name, self.early, self.file = name, early, file

    def __getitem__(self, grid):
        def launch(*args, num_warps, maxnreg, enable_fp_fusion, **constants):
            # NumPy has no bfloat16
            held = {i: value.float() for i, value in enumerate(args) if _is_bfloat16(value)}
            arrays = [_argument(held.get(i, value)) for i, value in enumerate(args)]
            for program in itertools.product(*map(range, grid)):
                _kernel(self, program)(*arrays, **constants)
            for i, value in held.items():
                args[i].copy_(value)

        return launch


def _is_bfloat16(value):
    return getattr(value, "dtype", None) is torch.bfloat16


def _argument(value):
    if not hasattr(value, "numpy"):
        return value
    if value.is_contiguous():
        return Pointer(value.numpy())
    # all that lies between the first element and the last
    span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return Pointer(value.as_strided((span,), (1,)).numpy())


def _kernel(emulated, program):
    return vars(_executed(emulated.file, Copies(emulated.early), program))[emulated.name]


def _executed(name, copies, program):
    """Run a file of kernels, and what it takes from others, as Python."""
    package = ModuleType("triton.experimental.gluon")
    package.jit = lambda function: function
    package.language = _language(program)
    ampere = ModuleType("triton.experimental.gluon.language.nvidia.ampere")
    ampere.async_copy = copies
    experimental = ModuleType("triton.experimental")
    experimental.gluon = package
    modules = {
        experimental.__name__: experimental,
        package.__name__: package,
        ampere.__name__: ampere,
    }
    text = (KERNELS / name).read_text()
    for other in re.findall(r"^from kernels\.(_\w+) import", text, re.MULTILINE):
        modules[f"kernels.{other}"] = _executed(f"{other}.py", copies, program)
    executed = ModuleType("emulated")
    with mock.patch.dict(sys.modules, modules):
        exec(compile(text, str(KERNELS / name), "exec"), vars(executed))  # noqa: S102  our own file
    return executed
