"""The product for a few tokens, by four-lane dot products on sliced weights.

    I[m,n] = mult (S - z_x C) - z_w (R - K z_x)                                  one scale a row
    Y[m,n] = s_x[m] s_w[n] float(I[m,n]) + bias[n]

    Y[m,n] = s_x[m] (sum_g s_w[n,g] (mult S - z_w R) - z_x T[n]) + bias[n]       scales in groups
    T[n]   = sum_g s_w[n,g] (mult C - K/S z_w)

with S = sum u_x u_w, C = sum u_w and R = sum u_x over a row or a group, in int32; S groups. Of a
group, every lane scales its own part of the integer: float32 adds up in a fixed order.

Reading the weights is all the time there is; `kernels._decode_kernel` says how that is reached and
`kernels.decode_config` how it is launched.

Shape legend: M tokens, N outputs, NP rows padded to whole blocks, L columns, G bytes in a slice.
"""

import math

import torch
import triton

from kernels._decode_kernel import decode_linear_kernel
from kernels.decode_config import MAX_TOKENS, LaunchConfig, decode_configs, select_config
from kernels.overlap import can_overlap
from kernels.sliced import SlicedWeight
from kernels.sliced_reference import check_operands
from kernels.tokens import TokenCodes

__all__ = ["LaunchConfig", "decode_configs", "decode_linear", "select_config"]

SLICES = 8
LARGEST_WORD = 8
"""Bytes."""
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def decode_linear(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: LaunchConfig | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply 1 to 8 tokens by a sliced weight, on a GPU or in the interpreter.

    Args:
        tokens: M tokens of at least L codes, rows 16-byte aligned.
        weight: N outputs.
        bias: float ``[N]`` or None.
        out_dtype: float16, bfloat16 or float32.
        config: the launch; None selects.
        counters: for launches that split K, int32 zeros, one for every tile of rows; they are left
            zero, so one tensor serves every launch of a stream. None allocates and clears them,
            which is a launch more.

    Returns:
        ``[M, N]`` of ``out_dtype``: bit-equal to the reference per channel, within float32
        rounding of the sum over groups otherwise, and the same in every run.

    Raises:
        ValueError: if operands do not fit each other or the launch does not fit the weight.
    """
    m, n = tokens.codes.shape[0], weight.out_features
    config = config or select_config(
        bits=weight.bits,
        n=n,
        columns=weight.columns,
        slice_bytes=weight.slice_bytes,
        m=m,
        grouped=weight.groups > 1,
    )
    _check_launch(tokens, weight, out_dtype, config)
    out = tokens.codes.new_empty((m, n), dtype=out_dtype)
    tiles = triton.cdiv(n, config.rows)
    partials = out
    if config.split_k > 1:
        kind = torch.int32 if weight.groups == 1 else torch.float32
        partials = out.new_empty((config.split_k, m, weight.padded_rows), dtype=kind)
        counters = out.new_zeros(tiles, dtype=torch.int32) if counters is None else counters
    x = tokens.codes.view(torch.int32)
    fields = [field.view(torch.int32) for field in weight.fields]
    fields += fields[:1] * (3 - len(fields))
    field_bits = (*weight.field_bits, 0, 0)
    slice_words = weight.slice_bytes // 4
    word_groups = _word_groups(weight)
    scales = _as_words(weight.scale, word_groups) if weight.groups > 1 else weight.scale
    zero_codes = _as_words(weight.zero_codes, word_groups)
    interpreted = not isinstance(decode_linear_kernel, triton.JITFunction)
    pdl = config.launch_pdl and not interpreted and can_overlap(out.device.index)
    decode_linear_kernel[(tiles, config.split_k)](
        x, x.stride(0),
        tokens.scale, tokens.zero_point, tokens.sums,
        *fields, weight.padded_rows * slice_words,
        scales, weight.zero_point, zero_codes, weight.sums, weight.terms,
        bias if bias is not None else out,
        out, out.stride(0),
        partials, weight.padded_rows,
        out if counters is None else counters,
        m, n,
        F0=field_bits[0],
        F1=field_bits[1],
        F2=field_bits[2],
        MULTIPLIER=weight.multiplier,
        GROUPS=weight.groups,
        GROUP_SIZE=weight.group_size,
        WORD_GROUPS=word_groups,
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=weight.block_rows,
        W=slice_words,
        K_BLOCKS=weight.columns // (SLICES * weight.slice_bytes),
        MP=triton.next_power_of_2(m),
        RT=config.thread_rows,
        RL=config.lane_rows,
        KB=config.turn_blocks,
        SPLIT_K=config.split_k,
        PDL=pdl,
        INTERP=interpreted,
        num_warps=config.num_warps,
        num_stages=1,
        # products at the end are rounded before they are summed, as the reference does
        enable_fp_fusion=False,
        **_launch_options(config, pdl=pdl),
    )  # fmt: skip
    return out


def _word_groups(weight: SlicedWeight) -> int:
    """Groups of a row and of a block of columns whose scales make one word."""
    in_block = max(1, SLICES * weight.slice_bytes // weight.group_size)
    return math.gcd(weight.groups, in_block, LARGEST_WORD // weight.scale.itemsize)


def _as_words(per_group: torch.Tensor, word_groups: int) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return per_group.view(kinds[per_group.itemsize * word_groups])


def _launch_options(config: LaunchConfig, *, pdl: bool) -> dict[str, int | bool]:
    options: dict[str, int | bool] = {"launch_pdl": True} if pdl else {}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def _check_launch(
    tokens: TokenCodes, weight: SlicedWeight, out_dtype: torch.dtype, config: LaunchConfig
) -> None:
    m = tokens.codes.shape[0]
    if not 1 <= m <= MAX_TOKENS:
        raise ValueError(f"{m} tokens; this kernel takes 1 to {MAX_TOKENS}")
    check_operands(tokens, weight, columns=weight.columns)
    if tokens.codes.stride(1) != 1 or tokens.codes.stride(0) % 16 or tokens.codes.data_ptr() % 16:
        raise ValueError(f"rows of {tokens.codes.stride()} strides are not 16-byte aligned")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype {out_dtype} is none of {OUT_DTYPES}")
    if weight.block_rows % config.rows:
        raise ValueError(f"{config.rows} rows do not divide a block of {weight.block_rows}")
    slices = weight.group_size // weight.slice_bytes
    if weight.groups > 1 and SLICES % slices:
        raise ValueError(
            f"a group of {weight.group_size} columns is {slices} slices: no even part of {SLICES}"
        )
