"""The product for a few tokens, by four-lane dot products on sliced weights.

    I[m,n,g] = mult (S - z_x C) - z_w (R - G z_x)         S = sum_k u_x u_w, C = sum_k u_w, R = sum_k u_x
    Y[m,n]   = s_x[m] (sum_g s_w[n,g] float(I[m,n,g])) + bias[n]

A word of a run holds 32/f codes; one mask leaves four codes of consecutive columns, which `dp4a`
multiplies by one word of int8 activations. Nothing is shuffled, converted or staged on the way.
Reading the weights is all the time there is, so a program issues every load of a turn before its
first use and meets no barrier until its sums are complete; the next turn is read meanwhile.

Layout of a tile: int32 ``[MP, RT, KB, RL, W]``. Lanes run over the W words of a slice, then over RL
rows, then over blocks of columns, so that a warp reads whole 128-byte lines; warps take further
blocks of columns. The RT rows of a thread share its activations. With group scales, C is summed
from the codes in registers: reading it would cost more bytes than a narrow weight can spare.

Shape legend: M tokens, MP their next power of two, N outputs, NP rows padded to BN, L columns,
G bytes in a slice, W = G / 4, KB blocks of 8G columns, S scale groups.
"""

import torch
import triton
import triton.language as tl

from kernels.decode_config import MAX_TOKENS, LaunchConfig, decode_configs, select_config
from kernels.sliced import SlicedWeight
from kernels.sliced_reference import check_operands
from kernels.tokens import TokenCodes

__all__ = ["LaunchConfig", "decode_configs", "decode_linear", "select_config"]

SLICES = 8
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
    interpreted = not isinstance(_decode_linear_kernel, triton.JITFunction)
    _decode_linear_kernel[(tiles, config.split_k)](
        x, x.stride(0),
        tokens.scale, tokens.zero_point, tokens.sums,
        *fields, weight.padded_rows * slice_words,
        weight.scale, weight.zero_point, weight.zero_codes, weight.sums,
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
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=weight.block_rows,
        W=slice_words,
        K_BLOCKS=weight.columns // (SLICES * weight.slice_bytes),
        MP=triton.next_power_of_2(m),
        RT=config.thread_rows,
        RL=config.lane_rows,
        KB=config.turn_blocks,
        SPLIT_K=config.split_k,
        PREFETCH=config.prefetch,
        PDL=config.launch_pdl and not interpreted,
        INTERP=interpreted,
        num_warps=config.num_warps,
        num_stages=1,
        # products are rounded before they are summed, as the reference does
        enable_fp_fusion=False,
        **_launch_options(config),
    )  # fmt: skip
    return out


@triton.jit
def _decode_linear_kernel(
    x_ptr, stride_xm,
    x_scale_ptr, x_zero_ptr, x_sums_ptr,
    w0_ptr, w1_ptr, w2_ptr, run_words,
    w_scale_ptr, w_zero_ptr, zero_codes_ptr, w_sums_ptr,
    bias_ptr,
    out_ptr, stride_om,
    partials_ptr, stride_pm,
    counters_ptr,
    M, N,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    W: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    MP: tl.constexpr,
    RT: tl.constexpr,
    RL: tl.constexpr,
    KB: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program multiplies RT x RL rows by every token, over one part of the columns."""
    SPLIT_BLOCKS: tl.constexpr = (K_BLOCKS + SPLIT_K - 1) // SPLIT_K
    TURNS: tl.constexpr = (SPLIT_BLOCKS + KB - 1) // KB
    EVEN: tl.constexpr = TURNS * KB * SPLIT_K == K_BLOCKS
    AHEAD: tl.constexpr = PREFETCH and TURNS > 1
    GROUPED: tl.constexpr = GROUPS > 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    first_row = pid.to(tl.int64) * (RT * RL)
    first_kb = tl.program_id(1) * SPLIT_BLOCKS
    end_kb = tl.minimum(first_kb + SPLIT_BLOCKS, K_BLOCKS)
    lane = tl.arange(0, RL)[None, None, :]
    row = (tl.arange(0, RT) * RL)[None, :, None] + lane
    offs_n = first_row + row
    offs_w = tl.arange(0, W)[None, None, None, None, :]
    offs_kb = tl.arange(0, KB)
    # a tile lies inside one block of BLOCK_ROWS rows
    in_run = ((first_row % BLOCK_ROWS).to(tl.int32) + row)[:, :, None, :, None] * W + offs_w
    run = first_row // BLOCK_ROWS * (BLOCK_ROWS * W)
    w0_ptrs = w0_ptr + run * F0 + in_run
    w1_ptrs = w1_ptr + run * F1 + in_run
    w2_ptrs = w2_ptr + run * F2 + in_run
    scale_ptrs = w_scale_ptr + offs_n * GROUPS
    zero_ptrs = zero_codes_ptr + offs_n * GROUPS

    turn_data = _load_turn(
        w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, first_kb + offs_kb, end_kb,
        F0, F1, F2, GROUPS, GROUP_SIZE, BLOCK_ROWS, W, EVEN,
    )  # fmt: skip
    if not GROUPED:
        w_scale = tl.load(scale_ptrs).to(tl.float32)
        w_zero = tl.load(w_zero_ptr + offs_n)
        w_sum = tl.load(w_sums_ptr + offs_n)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # tokens beyond the last repeat it and are not stored
    offs_m = tl.arange(0, MP)[:, None, None]
    token = tl.minimum(offs_m, M - 1)
    x_zero = tl.load(x_zero_ptr + token)
    x_scale = tl.load(x_scale_ptr + token)
    # every lane loads what it multiplies: rows of a warp read one address
    x_rows = x_ptr + token[:, :, None, :, None] * stride_xm
    x_rows = x_rows + (lane * 0)[:, :, None, :, None] + offs_w
    if GROUPED:
        total = tl.zeros((MP, RT, KB, RL), dtype=tl.float32)
    else:
        x_sum = tl.load(x_sums_ptr + token) - GROUP_SIZE * x_zero
        total = tl.zeros((MP, RT, KB, RL, W), dtype=tl.int32)
    for turn in range(TURNS):
        kb = first_kb + turn * KB + offs_kb
        if TURNS > 1 and PREFETCH:
            next_data = _load_turn(
                w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, kb + KB, end_kb,
                F0, F1, F2, GROUPS, GROUP_SIZE, BLOCK_ROWS, W, False,
            )  # fmt: skip
        # a block beyond the last has no weights: any activations will do
        x_ptrs = x_rows + (tl.minimum(kb, K_BLOCKS - 1) * (8 * W))[None, None, :, None, None]
        if GROUPED:
            total += _sum_groups(
                turn_data, x_ptrs, x_sums_ptr + token * GROUPS, x_zero, kb,
                F0, F1, F2, MULTIPLIER, GROUPS, GROUP_SIZE, W, INTERP,
            )  # fmt: skip
        else:
            dot, _ = _multiply(turn_data, x_ptrs, 0, 8, F0, F1, F2, False, W, INTERP)
            total += dot
        if TURNS > 1 and not PREFETCH:
            next_data = _load_turn(
                w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, kb + KB, end_kb,
                F0, F1, F2, GROUPS, GROUP_SIZE, BLOCK_ROWS, W, False,
            )  # fmt: skip
        if TURNS > 1:
            turn_data = next_data

    total = tl.sum(total, axis=2) if GROUPED else tl.sum(tl.sum(total, axis=4), axis=2)
    mask = (offs_m < M) & (offs_n < N)
    finish = True
    if SPLIT_K > 1:
        partial_ptrs = partials_ptr + offs_m * stride_pm + offs_n
        stride_ps = M * stride_pm
        tl.store(partial_ptrs + tl.program_id(1) * stride_ps, total, mask=offs_m < M)
        # the counter must not be seen before any thread's sums
        tl.debug_barrier()
        finish = tl.atomic_add(counters_ptr + pid, 1, sem="acq_rel") == SPLIT_K - 1
    if finish:
        if SPLIT_K > 1:
            tl.store(counters_ptr + pid, 0)
            total = tl.zeros_like(total)
            for split in tl.static_range(SPLIT_K):
                total += tl.load(
                    partial_ptrs + split * stride_ps, mask=offs_m < M, other=0, cache_modifier=".cg"
                )
        if GROUPED:
            y = total
        else:
            # int32 may wrap on the way; the result fits
            integer = MULTIPLIER * (total - w_sum * x_zero) - w_zero * x_sum
            y = integer.to(tl.float32) * w_scale
        y *= x_scale
        if HAS_BIAS:
            y += bias
        tl.store(out_ptr + offs_m * stride_om + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_turn(
    w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, kb, end_kb,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Load every run of a turn, lowest field first, then scales and zero-points of its groups."""
    RUN: tl.constexpr = BLOCK_ROWS * W
    valid = kb < end_kb
    offs = (kb * run_words)[None, None, :, None, None]
    data = ()
    for r in tl.static_range(F0 + F1 + F2):
        if r < F0:
            ptrs = w0_ptrs + (offs * F0 + r * RUN)
        elif r < F0 + F1:
            ptrs = w1_ptrs + (offs * F1 + (r - F0) * RUN)
        else:
            ptrs = w2_ptrs + (offs * F2 + (r - F0 - F1) * RUN)
        if EVEN:
            words = tl.load(ptrs, eviction_policy="evict_first")
        else:
            words = tl.load(
                ptrs, mask=valid[None, None, :, None, None], other=0, eviction_policy="evict_first"
            )
        data = data + (words,)
    if GROUPS > 1:
        SLICES: tl.constexpr = GROUP_SIZE // (4 * W)
        PARTS: tl.constexpr = 8 // SLICES if SLICES < 8 else 1
        for part in tl.static_range(PARTS):
            group = (kb * 8 + part * SLICES) // SLICES
            # a group beyond the last counts nothing
            counts = (valid & (group < GROUPS))[None, None, :, None]
            group = tl.minimum(group, GROUPS - 1)[None, None, :, None]
            scale = tl.load(scale_ptrs[:, :, None, :] + group).to(tl.float32)
            data = data + (tl.where(counts, scale, 0.0), tl.load(zero_ptrs[:, :, None, :] + group))
    return data


@triton.jit
def _sum_groups(
    turn_data, x_ptrs, x_sum_ptrs, x_zero, kb,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    W: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Scale the exact integer of every group of a turn: float32 ``[MP, RT, KB, RL]``."""
    SLICES: tl.constexpr = GROUP_SIZE // (4 * W)
    PARTS: tl.constexpr = 8 // SLICES if SLICES < 8 else 1
    SHIFT: tl.constexpr = 128 if F0 == 8 else 0
    RUNS: tl.constexpr = F0 + F1 + F2
    x_zero = x_zero[:, :, None, :]
    result = tl.zeros((1, 1, 1, 1), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        dot, codes = _multiply(
            turn_data, x_ptrs, part * (8 // PARTS), 8 // PARTS, F0, F1, F2, True, W, INTERP
        )
        dot = tl.sum(dot - codes * x_zero[:, :, :, :, None], axis=4)
        group = tl.minimum((kb * 8 + part * SLICES) // SLICES, GROUPS - 1)[None, None, :, None]
        x_sum = tl.load(x_sum_ptrs[:, :, None, :] + group) - GROUP_SIZE * x_zero
        zero = MULTIPLIER * (turn_data[RUNS + 2 * part + 1].to(tl.int32) - SHIFT) + MULTIPLIER - 1
        integer = MULTIPLIER * dot - zero * x_sum
        result += integer.to(tl.float32) * turn_data[RUNS + 2 * part]
    return result


@triton.jit
def _multiply(
    turn_data, x_ptrs,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    WITH_CODES: tl.constexpr,
    W: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Sum codes times activations, and codes alone, over COUNT slices, one chain a field."""
    none = tl.zeros((1, 1, 1, 1, 1), dtype=tl.int32)
    ones = none + 0x01010101
    dot0, dot1, dot2 = none, none, none
    sum0, sum1, sum2 = none, none, none
    for s in tl.static_range(FIRST, FIRST + COUNT):
        x = tl.load(x_ptrs + s * W, eviction_policy="evict_last")
        codes0 = _codes(turn_data, s, 0, F0)
        dot0 = _dp4a(codes0, x, dot0, F0 == 8, INTERP)
        if WITH_CODES:
            sum0 = _dp4a(codes0, ones, sum0, F0 == 8, INTERP)
        if F1:
            codes1 = _codes(turn_data, s, F0, F1)
            dot1 = _dp4a(codes1, x, dot1, False, INTERP)
            if WITH_CODES:
                sum1 = _dp4a(codes1, ones, sum1, False, INTERP)
        if F2:
            codes2 = _codes(turn_data, s, F0 + F1, F2)
            dot2 = _dp4a(codes2, x, dot2, False, INTERP)
            if WITH_CODES:
                sum2 = _dp4a(codes2, ones, sum2, False, INTERP)
    return (
        _joined(dot0, dot1, dot2, F0, F1, F2),
        _joined(sum0, sum1, sum2, F0, F1, F2) if WITH_CODES else none,
    )


@triton.jit
def _codes(turn_data, s: tl.constexpr, FIRST_RUN: tl.constexpr, F: tl.constexpr):
    """Four codes a word of one slice, as they lie in the run that holds it."""
    words = turn_data[FIRST_RUN + s // (8 // F)]
    if F < 8:
        words = (words >> (F * (s % (8 // F)))) & (0x01010101 * ((1 << F) - 1))
    return words


@triton.jit
def _joined(value0, value1, value2, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr):
    """Put the sums of fields in their places."""
    if F1:
        value0 += value1 << F0
    if F2:
        value0 += value2 << (F0 + F1)
    return value0


@triton.jit
def _dp4a(codes, x, acc, SIGNED: tl.constexpr, INTERP: tl.constexpr):
    """Add the product of four codes and four signed bytes to every element."""
    if INTERP:
        for lane in tl.static_range(4):
            code = (codes << (24 - 8 * lane)) >> 24
            acc += (code if SIGNED else code & 255) * ((x << (24 - 8 * lane)) >> 24)
        return acc
    elif SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


def _launch_options(config: LaunchConfig) -> dict[str, int | bool]:
    options: dict[str, int | bool] = {}
    if config.launch_pdl:
        options["launch_pdl"] = True
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
    if weight.groups > 1 and slices % SLICES and SLICES % slices:
        raise ValueError(
            f"a group of {weight.group_size} columns is {slices} slices: no part of {SLICES},"
            " nor whole blocks"
        )
