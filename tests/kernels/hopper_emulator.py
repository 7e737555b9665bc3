"""Run the Gluon prefill kernels on NumPy, as Gluon has no interpreter.

Their files run as Python with stand-ins for Gluon. Copies land at once or only when they are
waited for, and a product reads its operands as late as the waits allow: a buffer that is filled too
early or read too soon gives wrong results. Layouts are not modelled; machine code shows those.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch

from tests.kernels.assembly import run_assembly

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = ("_prefill_orders", "_prefill_results", "_prefill_groups_kernel", "prefill_linear")
GARBAGE = 0x55


class Tensor(np.ndarray):
    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


class Pointer:
    def __init__(self, tensor, offsets=0):
        self.tensor, self.offsets = tensor, offsets
        self.dtype = SimpleNamespace(element_ty=tensor.numpy().dtype)

    def __add__(self, offsets):
        return Pointer(self.tensor, self.offsets + offsets)


class Memory:
    """A view of shared memory."""

    def __init__(self, array):
        self.array = array

    def index(self, i):
        return Memory(self.array[i])

    def permute(self, order):
        return Memory(self.array.transpose(order))

    def reinterpret(self, dtype, shape, layout):
        return Memory(self.array.reshape(shape))

    def load(self, layout):
        return self.array.copy()

    def store(self, value):
        self.array[...] = value


class Barrier:
    def __init__(self):
        self.copies, self.expected, self.waited = [], None, 0

    def index(self, i):
        return self


class Descriptor:
    def __init__(self, tensor, shape, strides, box, layout):
        view = torch.as_strided(tensor, shape, strides).numpy()
        self.array, self.layout, self.dtype = view, layout, view.dtype
        self.block_type = SimpleNamespace(shape=list(box))

    def box(self, place):
        """The elements of a box, zero beyond the tensor."""
        out = np.zeros(self.block_type.shape, self.dtype)
        ends = [
            min(p + b, n)
            for p, b, n in zip(place, self.block_type.shape, self.array.shape, strict=True)
        ]
        inside = self.array[tuple(slice(p, e) for p, e in zip(place, ends, strict=True))]
        out[tuple(slice(0, size) for size in inside.shape)] = inside
        return out

    def fill(self, place, values):
        """Write a box but for what lies beyond the tensor."""
        target = self.array[
            tuple(slice(p, p + b) for p, b in zip(place, values.shape, strict=True))
        ]
        target[...] = values[tuple(slice(0, size) for size in target.shape)]


class Machine:
    """One program at a time, its outstanding products and the moment that copies land."""

    def __init__(self, late):
        self.late, self.program, self.programs, self.products = late, 0, 1, []
        self.leaving = []

    def copy(self, descriptor, place, barrier, target, pred):
        if pred:
            data = descriptor.box(place)
            target.array[...] = GARBAGE if self.late else data
            barrier.copies.append((target.array, data))

    def copy_out(self, descriptor, place, source):
        self.leaving.append((descriptor, place, source))
        if not self.late:
            self.wait_results(0)

    def wait_results(self, outstanding):
        while len(self.leaving) > outstanding:
            descriptor, place, source = self.leaving.pop(0)
            descriptor.fill(place, source.array)

    def expect(self, barrier, size, pred):
        if pred:
            assert barrier.expected is None, "a stage is ordered before it was read"
            barrier.expected = size

    def wait(self, barrier, phase):
        assert barrier.waited & 1 == phase
        assert barrier.expected == sum(data.nbytes for _, data in barrier.copies)
        for target, data in barrier.copies:
            target[...] = data
        barrier.copies, barrier.expected, barrier.waited = [], None, barrier.waited + 1

    def multiply(self, left, right, acc, is_async, use_acc=True):
        # what is not added to is written over, and is garbage until then
        acc = acc if use_acc else np.full_like(acc, GARBAGE)
        self.products.append((left, right, acc, use_acc))
        return acc

    def wait_products(self, outstanding, deps):
        while len(self.products) > outstanding:
            left, right, acc, use_acc = self.products.pop(0)
            left = left.array if isinstance(left, Memory) else left
            product = (left.astype(np.float64) @ right.array.astype(np.float64)).astype(np.int32)
            acc[...] = product + acc if use_acc else product
        return deps[0] if len(deps) == 1 else deps


class Kernel:
    def __init__(self, function, machine):
        self.function, self.machine = function, machine

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, enable_fp_fusion, launch_pdl=False, **constants):
            args = [Pointer(a.view(-1)) if isinstance(a, torch.Tensor) else a for a in args]
            self.machine.programs = grid[0]
            for self.machine.program in range(grid[0]):
                self.function(*args, **constants)
                assert not self.machine.products
                assert not self.machine.leaving, "shared memory goes with the program"

        return launch


def allocate(dtype, shape, layout):
    if layout == "barrier":
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[i])
    return Memory(np.full(shape, GARBAGE, dtype))


def load(pointer, mask, other):
    places = np.where(mask, pointer.offsets, 0)
    return np.where(mask, pointer.tensor.numpy()[places], other).view(Tensor)


def store(pointer, value, mask):
    pointer.tensor.numpy()[np.broadcast_to(pointer.offsets, mask.shape)[mask]] = value[mask]


def inline_assembly(text, constraints, args, dtype, is_pure, pack):
    if not args:
        return None  # programs run one after the other: nothing to wait for
    words = []
    for arg in args:
        if isinstance(arg, int):
            words += [np.full_like(words[0], arg)] * 4
        elif arg.itemsize == 1:
            words.append(np.ascontiguousarray(arg).view(np.uint32))
        else:
            # the same word for all columns: each of the four elements has a register
            assert arg.shape[1] == 1
            words += [np.broadcast_to(arg.view(np.uint32), words[0].shape)] * 4
    return run_assembly(text, words).astype(np.uint32).view(dtype)


def multiply_add(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


def language(machine):
    gl = ModuleType("language")
    gl.constexpr = lambda value: value
    gl.shared_memory_descriptor = Memory
    gl.barrier = lambda: None
    gl.program_id = lambda axis: machine.program
    gl.num_programs = lambda axis: machine.programs
    gl.static_range, gl.cdiv = range, lambda a, b: -(-a // b)
    gl.minimum, gl.maximum = min, max
    gl.int8, gl.int16, gl.int32, gl.int64 = np.int8, np.int16, np.int32, np.int64
    gl.uint8 = np.uint8
    gl.float16, gl.float32, gl.fma = np.float16, np.float32, multiply_add
    gl.arange = lambda start, stop, layout: np.arange(start, stop).view(Tensor)
    gl.zeros = lambda shape, dtype, layout: np.zeros(shape, dtype).view(Tensor)
    gl.convert_layout = lambda value, layout: value
    gl.allocate_shared_memory, gl.load, gl.store = allocate, load, store
    gl.inline_asm_elementwise = inline_assembly
    for name in ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout"):
        setattr(gl, name, lambda *args, **kwargs: None)
    gl.NVMMASharedLayout = gl.BlockedLayout
    return gl


def emulated_prefill(*, late):
    """Return the `prefill_linear` of the file, its kernel a Python function."""
    machine = Machine(late)
    gluon = ModuleType("gluon")
    gluon.jit = lambda function: Kernel(function, machine)
    gluon.language = language(machine)
    hopper = ModuleType("hopper")
    hopper.tma = SimpleNamespace(
        async_load=machine.copy, async_store=machine.copy_out, store_wait=machine.wait_results
    )
    hopper.fence_async_shared = lambda: None
    hopper.mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=lambda barrier, count: None,
        expect=machine.expect,
        wait=machine.wait,
    )
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = machine.multiply, machine.wait_products
    hopper.TensorDescriptor = Descriptor
    root = "triton.experimental"
    stand_ins = {
        root: SimpleNamespace(gluon=gluon),
        f"{root}.gluon": gluon,
        f"{root}.gluon.language.nvidia.hopper": hopper,
        f"{root}.gluon.nvidia.hopper": hopper,
    }
    names = [f"kernels.{name}" for name in MODULES]
    with mock.patch.dict(sys.modules, stand_ins | {name: ModuleType(name) for name in names}):
        for name, qualified in zip(MODULES, names, strict=True):
            file = KERNELS / f"{name}.py"
            code = compile(file.read_text(), str(file), "exec")
            exec(code, vars(sys.modules[qualified]))  # noqa: S102  our own file
        return sys.modules[qualified].prefill_linear
