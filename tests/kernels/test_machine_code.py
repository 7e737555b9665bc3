import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tests.kernels.machine_code import compile_kernel

FLOATS = {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32"}


def _sum_rows(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        acc += tl.load(x_ptr + start + offs)
    tl.store(out_ptr + offs, acc)


def _copy(x_ptr, out_ptr, N, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    offs = gl.arange(0, BLOCK, layout)
    gl.store(out_ptr + offs, gl.load(x_ptr + offs))


def test_a_triton_kernel_shows_the_opcodes_of_its_loop(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    code = compile_kernel(
        triton.jit(_sum_rows), types=FLOATS, constants={"BLOCK": 512}, num_warps=4
    )

    assert code.count_in_loop("LDG.E.128") > 0
    assert code.count_in_loop("STG") == 0
    assert code.count("STG.E.128") == 1
    assert code.count_in_loop() < len(code.instructions)
    assert code.spills == 0


def test_a_gluon_kernel_without_a_loop_has_none(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    code = compile_kernel(gluon.jit(_copy), types=FLOATS, constants={"BLOCK": 512}, num_warps=4)

    assert (code.count("LDG.E.128"), code.count("STG.E.128")) == (1, 1)
    assert code.count_in_loop() == 0


def test_an_unaligned_pointer_costs_wide_loads(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    code = compile_kernel(
        gluon.jit(_copy), types=FLOATS, constants={"BLOCK": 512}, unaligned=("x_ptr",), num_warps=4
    )

    assert code.count("LDG.E.128") == 0
    assert code.count("LDG.E") == 4
