"""The integer linear layer: quantized tokens times packed weights, zero-points corrected exactly.

    S[m,n,g] = sum_{k in g} u_x[m,k] u_w[n,k]
    I[m,n,g] = S - z_w[n,g] R[m,g] - z_x[m] C[n,g] + G z_x[m] z_w[n,g]            integer
    Y[m,n]   = s_x[m] sum_g s_w[n,g] I[m,n,g] + bias[n]                            float32
    R[m,g]   = sum_{k in g} u_x[m,k]          C[n,g] = sum_{k in g} u_w[n,k]

Weights are read as bit-planes (`kernels.layouts`); a group is the whole row or whole 32-bit
words. I is exact and converted to float32 once; the sum over groups is float32, first group first,
product and sum rounded separately, so that every device gives the same bits.
The kernel multiplies int8: codes of 8 bits are shifted by 128 together with their zero-points and
sums, which leaves I unchanged.

Shape legend: M tokens, N outputs, K inputs, G inputs in a group, S = K / G groups, P planes,
W = ceil(K / 32) words.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl

from kernels.activation_quant import QuantizedActivations
from kernels.cpu_linear import cpu_linear, prepare_cpu_weight
from kernels.layouts import WORD_BITS, packed_words, unpack_codes

__all__ = ["PackedWeight", "integer_linear", "integer_linear_reference"]

INT32_END = 1 << 31
FLOAT32_EXACT = 1 << 24
SHIFT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A packed weight with what the kernel needs beside it."""

    packed: torch.Tensor
    """int32 ``[P, N, W]``."""
    scale: torch.Tensor
    """float16 ``[N, S]``."""
    zero_point: torch.Tensor
    """uint8 ``[N, S]``."""
    code_sums: torch.Tensor
    """int32 ``[N, S]``: C of the formula."""
    in_features: int

    @classmethod
    def from_stored(
        cls,
        packed: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        in_features: int,
    ) -> Self:
        """Derive the sums from the tensors of a checkpoint.

        Raises:
            ValueError: if the shapes do not fit each other or K, or int32 cannot hold the result.
        """
        _check_weight(packed, scale, zero_point, in_features)
        codes_NK = unpack_codes(packed, in_features)
        code_sums = codes_NK.view(*scale.shape, -1).sum(-1, dtype=torch.int32)
        return cls(
            packed=packed.contiguous(),
            scale=scale.contiguous(),
            zero_point=zero_point.contiguous(),
            code_sums=code_sums,
            in_features=in_features,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Tile and launch parameters of one kernel launch."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def select_config(m: int, k: int, groups: int) -> LaunchConfig:
    """Pick the launch for a shape: a heuristic from the compiled code, no tile has been tuned.

    Timed once as it is (H100, torch 2.11, triton 3.6, warm L2, 4096x4096, microseconds at 1 / 16 /
    2048 tokens): W2A8 61 / 71 / 543, W4A8 95 / 101 / 818, bf16 of cuBLAS 23 / 23 / 92. Unpacking
    one plane at a time costs about 20 instructions a weight and is what to change first.

    A step along K never leaves its group, so it is the largest power of two that divides a group.
    """
    group = k // groups
    # a whole row may end inside a step; its tail is masked
    fitting = 64 if groups == 1 else min(64, group & -group)
    block_m = min(64, max(16, triton.next_power_of_2(m)))
    return LaunchConfig(
        block_m=block_m, block_n=64, block_k=max(WORD_BITS, fitting), num_warps=4, num_stages=2
    )


def integer_linear(
    activations: QuantizedActivations, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply quantized tokens by a packed weight: Triton on a GPU, int8 torch on a CPU.

    Args:
        activations: M tokens of K codes, contiguous, 2..8 bits.
        weight: N outputs of K codes in 1..8 planes.
        bias: float ``[N]`` or None.

    Returns:
        float32 ``[M, N]``.

    Raises:
        ValueError: if K or the devices differ.
    """
    _check_operands(activations, weight)
    if weight.packed.device.type == "cpu":
        codes_NK = unpack_codes(weight.packed, weight.in_features)
        return cpu_linear(
            activations, prepare_cpu_weight(codes_NK, weight.scale, weight.zero_point), bias
        )
    return launch_integer_linear(activations, weight, bias)


def launch_integer_linear(
    activations: QuantizedActivations, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the Triton kernel, on a GPU or in the interpreter; see `integer_linear`."""
    m, k = activations.codes.shape
    planes, n, _ = weight.packed.shape
    groups = weight.scale.shape[1]
    codes = activations.codes.contiguous()
    out = codes.new_empty((m, n), dtype=torch.float32)
    if not m:
        return out
    token_sums = codes.view(m, groups, k // groups).sum(-1, dtype=torch.int32)
    config = select_config(m, k, groups)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m))
    _integer_linear_kernel[grid](
        codes, codes.stride(0),
        activations.scale, activations.zero_point, token_sums,
        weight.packed, weight.packed.stride(0), weight.packed.stride(1),
        weight.scale, weight.zero_point, weight.code_sums,
        bias if bias is not None else out,
        out, out.stride(0),
        m, n,
        K=k,
        GROUPS=groups,
        PLANES=planes,
        SHIFT_X=SHIFT if activations.bits == 8 else 0,
        SHIFT_W=SHIFT if planes == 8 else 0,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def integer_linear_reference(
    activations: QuantizedActivations, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `integer_linear` in plain torch, term by term, on any device.

    Products run in float32 where no partial sum can reach 2^24, else in float64: exact both ways.
    """
    m, k = activations.codes.shape
    n, groups = weight.scale.shape
    group = k // groups
    u_x = activations.codes.view(m, groups, group)
    u_w = unpack_codes(weight.packed, k).view(n, groups, group)
    bound = group * ((1 << weight.packed.shape[0]) - 1) * ((1 << activations.bits) - 1)
    exact = torch.float32 if bound < FLOAT32_EXACT else torch.float64
    z_x, z_w = activations.zero_point.to(torch.int64), weight.zero_point.to(torch.int64)
    out_MN = torch.zeros(m, n, device=u_x.device)
    for g in range(groups):
        dot_MN = (u_x[:, g].to(exact) @ u_w[:, g].to(exact).t()).to(torch.int64)
        token_sums_M1 = u_x[:, g].sum(-1, keepdim=True, dtype=torch.int64)
        weight_sums_N = u_w[:, g].sum(-1, dtype=torch.int64)
        integer_MN = (
            dot_MN - z_w[:, g] * token_sums_M1 - z_x * weight_sums_N + group * z_x * z_w[:, g]
        )
        out_MN += integer_MN.float() * weight.scale[:, g].float()
    out_MN *= activations.scale
    return out_MN if bias is None else out_MN + bias.float()


@triton.jit
def _integer_linear_kernel(
    x_ptr, stride_xm,
    x_scale_ptr, x_zero_ptr, x_sums_ptr,
    w_ptr, stride_wp, stride_wn,
    w_scale_ptr, w_zero_ptr, w_sums_ptr,
    bias_ptr,
    out_ptr, stride_om,
    M, N,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    SHIFT_X: tl.constexpr,
    SHIFT_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile ``[BLOCK_N, BLOCK_M]`` over all of K, weights on the left."""
    GROUP_SIZE: tl.constexpr = K // GROUPS
    STEPS: tl.constexpr = (GROUP_SIZE + BLOCK_K - 1) // BLOCK_K
    tl.static_assert(GROUPS == 1 or GROUP_SIZE % BLOCK_K == 0, "a step must not leave its group")
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    mask_m = offs_m < M

    x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
    x_zero = tl.load(x_zero_ptr + offs_m, mask=mask_m, other=0) - SHIFT_X
    out = tl.full((BLOCK_N, BLOCK_M), 0.0, dtype=tl.float32)
    for g in range(GROUPS):
        acc = tl.full((BLOCK_N, BLOCK_M), 0, dtype=tl.int32)
        for step in range(STEPS):
            start = g * GROUP_SIZE + step * BLOCK_K
            w = _load_weight_tile(
                w_ptr, stride_wp, stride_wn, offs_n, mask_n, start,
                K, PLANES, SHIFT_W, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            offs_k = start + tl.arange(0, BLOCK_K)
            x_ptrs = x_ptr + offs_k[:, None] + offs_m[None, :] * stride_xm
            mask_x = (offs_k < K)[:, None] & mask_m[None, :]
            # masked activations must be zero after the shift; `other=128` would do, but Triton 3.6
            # fills vectorized uint8 loads with 128, 255, 255, 255
            x = tl.load(x_ptrs, mask=mask_x, other=0).to(tl.int32) - SHIFT_X
            x = tl.where(mask_x, x, 0)
            acc += tl.dot(w, x.to(tl.int8), out_dtype=tl.int32)
        x_sum = tl.load(x_sums_ptr + offs_m * GROUPS + g, mask=mask_m, other=0)
        x_sum -= SHIFT_X * GROUP_SIZE
        w_sum = tl.load(w_sums_ptr + offs_n * GROUPS + g, mask=mask_n, other=0)
        w_sum -= SHIFT_W * GROUP_SIZE
        w_zero = tl.load(w_zero_ptr + offs_n * GROUPS + g, mask=mask_n, other=0).to(tl.int32)
        w_zero -= SHIFT_W
        w_scale = tl.load(w_scale_ptr + offs_n * GROUPS + g, mask=mask_n, other=0.0)
        # int32 may wrap on the way; the result fits
        acc -= w_zero[:, None] * (x_sum - GROUP_SIZE * x_zero)[None, :]
        acc -= w_sum[:, None] * x_zero[None, :]
        out += acc.to(tl.float32) * w_scale.to(tl.float32)[:, None]

    out *= x_scale[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + offs_n[:, None] + offs_m[None, :] * stride_om
    tl.store(out_ptrs, out, mask=mask_n[:, None] & mask_m[None, :])


@triton.jit
def _load_weight_tile(
    w_ptr, stride_wp, stride_wn,
    offs_n, mask_n, start,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    SHIFT_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Unpack int8 ``[BLOCK_N, BLOCK_K]`` codes, less the shift, from their bit-planes."""
    WORDS: tl.constexpr = BLOCK_K // 32
    offs_w = start // 32 + tl.arange(0, WORDS)
    w_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_w[None, :]
    mask_w = mask_n[:, None] & (offs_w < (K + 31) // 32)[None, :]
    bit = tl.arange(0, 32)
    codes = tl.full((BLOCK_N, WORDS, 32), 0, dtype=tl.int32)
    for plane in tl.static_range(PLANES):
        words = tl.load(w_ptrs + plane * stride_wp, mask=mask_w, other=0)
        codes |= ((words[:, :, None] >> bit[None, None, :]) & 1) << plane
    return (codes.reshape(BLOCK_N, BLOCK_K) - SHIFT_W).to(tl.int8)


def _check_weight(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> None:
    planes, n, words = packed.shape
    groups = scale.shape[1]
    if words != packed_words(in_features) or scale.shape[0] != n or zero_point.shape != scale.shape:
        raise ValueError(
            f"packed {tuple(packed.shape)}, scale {tuple(scale.shape)} and zero_point"
            f" {tuple(zero_point.shape)} do not make a weight of K = {in_features}"
        )
    group, ragged = divmod(in_features, groups)
    if ragged or (groups > 1 and group % WORD_BITS):
        raise ValueError(f"{groups} groups do not cut K = {in_features} into whole words")
    if group * 255 * ((1 << planes) - 1) >= INT32_END:
        raise ValueError(f"K = {in_features} at {planes} planes overflows int32; use groups")


def _check_operands(activations: QuantizedActivations, weight: PackedWeight) -> None:
    if activations.codes.shape[1] != weight.in_features:
        raise ValueError(
            f"activations have K = {activations.codes.shape[1]}, weights {weight.in_features}"
        )
    if activations.codes.device != weight.packed.device:
        raise ValueError(
            f"activations are on {activations.codes.device}, weights on {weight.packed.device}"
        )
