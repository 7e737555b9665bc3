import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tests.kernels.machine_code import compile_kernel

FLOATS = {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32"}


@triton.jit
def _sum_rows(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        acc += tl.load(x_ptr + start + offs)
    tl.store(out_ptr + offs, acc)


@gluon.jit
def _copy(x_ptr, out_ptr, N, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    offs = gl.arange(0, BLOCK, layout)
    gl.store(out_ptr + offs, gl.load(x_ptr + offs))


def compiled(kernel, **options):
    block = {"BLOCK": 512}
    return compile_kernel(__name__, kernel, types=FLOATS, constants=block, num_warps=4, **options)


def test_a_triton_kernel_shows_the_opcodes_of_its_loop():
    code = compiled("_sum_rows")

    assert code.count_in_loop("LDG.E.128") > 0
    assert code.count_in_loop("STG") == 0
    assert code.count("STG.E.128") == 1
    assert code.count_in_loop() < len(code.instructions)
    assert code.spills == 0


def test_a_gluon_kernel_without_a_loop_has_none():
    code = compiled("_copy")

    assert (code.count("LDG.E.128"), code.count("STG.E.128")) == (1, 1)
    assert code.count_in_loop() == 0


def test_an_unaligned_pointer_costs_wide_loads():
    code = compiled("_copy", unaligned=("x_ptr",))

    assert code.count("LDG.E.128") == 0
    assert code.count("LDG.E") == 4
