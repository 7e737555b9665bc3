"""Print, as JSON, the machine code of the key-value kernels on an H100: counts of opcodes.

A process of its own: Triton's own library decides at import, too, whether it is interpreted.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels._kv_append_kernel import append_kv_kernel
from kernels.attended_tokens import _combine_tokens_kernel
from kernels.paged_attention import _decode_kernel
from kernels.paged_prefill import _prefill_kernel

HOPPER = GPUTarget("cuda", 90, 32)
OPCODE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")
POINTERS = {
    "q_ptr": "*bf16", "query_ptr": "*bf16", "key_ptr": "*bf16", "value_ptr": "*bf16",
    "out_ptr": "*bf16", "like_ptr": "*bf16", "scale_ptr": "*fp32",
    "cos_ptr": "*fp32", "sin_ptr": "*fp32", "parts_ptr": "*fp32", "sums_ptr": "*fp32",
    "softmax_scale": "fp32", "soft_cap": "fp32",
    "query_norm_ptr": "*bf16", "key_norm_ptr": "*bf16", "query_eps": "fp32", "key_eps": "fp32",
}  # fmt: skip
SHAPE = {"KV_HEADS": 8, "HEAD_DIM": 128, "PAGE": 16, "HAS_WINDOW": False, "HAS_CAP": False,
         "PDL": False, "INTERP": False}  # fmt: skip
DECODE = SHAPE | {"SPLITS": 8, "MIN_CHUNK": 128, "BLOCK_G": 16}
PREFILL = SHAPE | {"GROUP": 4, "BLOCK_B": 8, "BLOCK_M": 128, "BLOCK_T": 64}
APPEND = {"KV_HEADS": 8, "PAGE": 16, "BITS": 4, "FIELD": 4, "WIDTH": 64, "ROTATED": 128,
          "NORM": "none", "BLOCK_D": 128, "PDL": False, "MIN_SCALE": 1e-5,
          "BLOCK_H": 2, "BLOCK_C": 64, "INTERP": False}  # fmt: skip


COMBINE = {"HEADS": 32, "HEAD_DIM": 128, "L": 4096, "GROUPS": 1, "BITS": 8, "HAS_WINDOW": False,
           "SPLITS": 8, "MIN_CHUNK": 128, "BLOCK_S": 8, "BLOCK_T": 128, "BLOCK_H": 32,
           "BLOCK_D": 128, "BLOCK": 4096, "UNROLL": 4, "PDL": True, "INTERP": False}  # fmt: skip


def packed(bits, width):
    return {"BITS": bits, "FIELD": bits, "WIDTH": width, "BLOCK_W": width}


def opcodes(kernel, constants, codes, zeros, **options):
    """Compile and count."""
    names = kernel.arg_names
    kinds = POINTERS | {"codes_ptr": codes, "zero_ptr": zeros}
    types = {
        name: "constexpr" if name in constants
        else kinds.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in names
    }  # fmt: skip
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name.startswith("stride_") or name.endswith("_ptr")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, types, values, aligned), target=HOPPER, options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return collections.Counter(OPCODE.findall(text))


if __name__ == "__main__":
    fused = {"enable_fp_fusion": True}
    report = {
        "decode 4": opcodes(
            _decode_kernel, DECODE | packed(4, 32) | {"BLOCK_T": 128}, "*i16", "*i32",
            num_warps=4, num_stages=3, **fused,
        ),
        "decode 2": opcodes(
            _decode_kernel, DECODE | packed(2, 16) | {"BLOCK_T": 32}, "*i16", "*i32",
            num_warps=1, num_stages=3, **fused,
        ),
        "prefill 4": opcodes(
            _prefill_kernel, PREFILL | packed(4, 32), "*i16", "*i32",
            num_warps=8, num_stages=2, **fused,
        ),
        "append 4": opcodes(
            append_kv_kernel, APPEND, "*u8", "*u8", num_warps=1, enable_fp_fusion=False
        ),
        "append 4 normed": opcodes(
            append_kv_kernel, APPEND | {"NORM": "rms", "PDL": True}, "*u8", "*u8",
            num_warps=1, enable_fp_fusion=False,
        ),
        "combine 8": opcodes(
            _combine_tokens_kernel, COMBINE, "*i8", "*i32", num_warps=8, enable_fp_fusion=False
        ),
    }  # fmt: skip
    sys.stdout.write(json.dumps(report))
