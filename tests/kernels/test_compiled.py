"""What the kernel becomes on an H100, read from the machine code; no GPU needed."""

import re
import subprocess

import pytest
import triton

# the compiler imports it with the first kernel, and it looks at TRITON_INTERPRET then, which the
# fixture has changed by that time
import triton.experimental.gluon
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    "x_ptr": "*u8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sums_ptr": "*i32",
    "w_ptr": "*i32", "w_scale_ptr": "*fp16", "w_zero_ptr": "*u8", "w_sums_ptr": "*i32",
    "bias_ptr": "*fp32", "out_ptr": "*fp32",
}  # fmt: skip
STRIDES = ("stride_xm", "stride_wp", "stride_wn", "stride_om")


def machine_code(module, tmp_path, *, m, k, groups, planes, a_bits):
    kernel = module._integer_linear_kernel  # noqa: SLF001  what the launcher launches
    config = module.select_config(m, k, groups)
    constants = {
        "K": k, "GROUPS": groups, "PLANES": planes, "SHIFT_X": 128 if a_bits == 8 else 0,
        "SHIFT_W": 128 if planes == 8 else 0, "HAS_BIAS": True, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    names = kernel.arg_names
    types = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*POINTERS, *STRIDES)}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }
    compiled = triton.compile(source, target=HOPPER, options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return compiled, set(re.findall(r"\b(?:IGMMA|IMMA|LDL|STL|FFMA)\b", text))


@pytest.mark.parametrize("planes", range(1, 9))
@pytest.mark.parametrize("m", [1, 64])
def test_it_becomes_int8_tensor_instructions_without_spills(
    compiled_int_linear, tmp_path, planes, m
):
    compiled, opcodes = machine_code(
        compiled_int_linear, tmp_path, m=m, k=4096, groups=1, planes=planes, a_bits=8
    )

    assert opcodes & {"IGMMA", "IMMA"}
    assert not opcodes & {"LDL", "STL"}
    assert compiled.metadata.shared <= 48 * 1024


@pytest.mark.parametrize("groups", [32, 64, 128])
def test_group_scales_do_not_spill_either_and_products_are_rounded_before_the_sum(
    compiled_int_linear, tmp_path, groups
):
    _, opcodes = machine_code(
        compiled_int_linear, tmp_path, m=16, k=4096, groups=groups, planes=4, a_bits=4
    )

    assert opcodes & {"IGMMA", "IMMA"}
    assert not opcodes & {"LDL", "STL", "FFMA"}
