"""What the kernel becomes on an H100, read from the machine code; no GPU needed."""

import pytest

from kernels.int_linear import select_config
from tests.kernels.machine_code import compile_kernel

POINTERS = {
    "x_ptr": "*u8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sums_ptr": "*i32",
    "w_ptr": "*i32", "w_scale_ptr": "*fp16", "w_zero_ptr": "*u8", "w_sums_ptr": "*i32",
    "bias_ptr": "*fp32", "out_ptr": "*fp32",
}  # fmt: skip


def machine_code(*, m, k, groups, planes, a_bits):
    config = select_config(m, k, groups)
    constants = {
        "K": k, "GROUPS": groups, "PLANES": planes, "SHIFT_X": 128 if a_bits == 8 else 0,
        "SHIFT_W": 128 if planes == 8 else 0, "HAS_BIAS": True, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    return compile_kernel(
        "kernels.int_linear", "_integer_linear_kernel",
        types=POINTERS, constants=constants, unaligned=("M", "N"),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize("planes", range(1, 9))
@pytest.mark.parametrize("m", [1, 64])
def test_it_becomes_int8_tensor_instructions_without_spills(planes, m):
    code = machine_code(m=m, k=4096, groups=1, planes=planes, a_bits=8)

    assert code.count("IGMMA", "IMMA")
    assert not code.spills
    assert code.shared_bytes <= 48 * 1024


@pytest.mark.parametrize("groups", [32, 64, 128])
def test_group_scales_do_not_spill_either_and_products_are_rounded_before_the_sum(groups):
    code = machine_code(m=16, k=4096, groups=groups, planes=4, a_bits=4)

    assert code.count("IGMMA", "IMMA")
    assert not code.spills
    assert not code.count("FFMA")
