"""The kernel of `kernels.decode_linear`: four-lane dot products on sliced weights.

A word of a run holds 32/f codes; one mask leaves four codes of consecutive columns, which `dp4a`
multiplies by one word of int8 activations. Nothing is shuffled, converted or staged on the way.
Reading the weights is all the time there is, so a program issues every load of a turn before its
first use and meets no barrier until its sums are complete; the next turn is read meanwhile.

Layout of a tile: int32 ``[KB, RL, W]``. Lanes run over the W words of a slice, then over RL rows,
then over blocks of columns, so that a warp reads whole 128-byte lines; warps take further blocks of
columns. The RT tiles of rows of a thread share its activations, the MP tokens its weights: those
are tuples of tiles and no axes, so that all tiles have one layout. As axes, the compiler gave
activations a layout of their own and brought them into that of the weights through shared memory,
two barriers a slice. With group scales, C is summed from the codes in registers: reading it would
cost more bytes than a narrow weight can spare.

Shape legend: M tokens, MP their next power of two, N outputs, NP rows padded to BN, L columns,
G bytes in a slice, W = G / 4, KB blocks of 8G columns, S scale groups.
"""

import triton
import triton.language as tl

from kernels._decode_products import add_codes, multiply_slices

__all__ = ["decode_linear_kernel"]


@triton.jit
def decode_linear_kernel(
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
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """One program multiplies RT x RL rows by every token, over one part of the columns."""
    SPLIT_BLOCKS: tl.constexpr = (K_BLOCKS + SPLIT_K - 1) // SPLIT_K
    TURNS: tl.constexpr = (SPLIT_BLOCKS + KB - 1) // KB
    EVEN: tl.constexpr = TURNS * KB * SPLIT_K == K_BLOCKS
    GROUPED: tl.constexpr = GROUPS > 1
    _start_next(PDL)
    COUNT: tl.constexpr = RT * MP
    first_row = tl.program_id(0).to(tl.int64) * (RT * RL)
    first_kb = tl.program_id(1) * SPLIT_BLOCKS
    end_kb = tl.minimum(first_kb + SPLIT_BLOCKS, K_BLOCKS)
    lane = tl.arange(0, RL)
    offs_w = tl.arange(0, W)
    offs_kb = tl.arange(0, KB)
    # a tile lies inside one block of BLOCK_ROWS rows
    in_block = (first_row % BLOCK_ROWS).to(tl.int32) + lane
    in_run = in_block[None, :, None] * W + offs_w[None, None, :]
    run = first_row // BLOCK_ROWS * (BLOCK_ROWS * W)
    w0_ptrs = w0_ptr + run * F0 + in_run
    w1_ptrs = w1_ptr + run * F1 + in_run
    w2_ptrs = w2_ptr + run * F2 + in_run
    scale_ptrs = w_scale_ptr + (first_row + lane)[None, :] * GROUPS
    zero_ptrs = zero_codes_ptr + (first_row + lane)[None, :] * GROUPS

    data = _load_turn(
        w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, first_kb + offs_kb, end_kb,
        F0, F1, F2, GROUPS, GROUP_SIZE, BLOCK_ROWS, W, RT, RL, EVEN,
    )  # fmt: skip
    # what a row needs at the end, every token beside the others; with groups, a turn has brought it
    place = tl.arange(0, COUNT)[None, :]
    offs_n = first_row + place // MP * RL + lane[:, None]
    mask_n = offs_n < N
    w_scale = 0.0 if GROUPED else tl.load(w_scale_ptr + offs_n).to(tl.float32)
    w_zero = 0 if GROUPED else tl.load(w_zero_ptr + offs_n)
    w_sum = 0 if GROUPED else tl.load(w_sums_ptr + offs_n)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    _wait_for_tokens(PDL)
    # tokens beyond the last repeat it and are not stored
    offs_m = place % MP
    token = tl.minimum(offs_m, M - 1)
    x_zero = tl.load(x_zero_ptr + token)
    x_scale = tl.load(x_scale_ptr + token)
    x_sum = 0 if GROUPED else tl.load(x_sums_ptr + token) - GROUP_SIZE * x_zero
    # every lane loads what it multiplies: the rows of a warp read one address
    x_ptrs = x_ptr + (lane * 0)[None, :, None] + offs_w[None, None, :]

    none = tl.full((KB, RL), 0.0, tl.float32) if GROUPED else tl.full((KB, RL, W), 0, tl.int32)
    totals = (none,) * COUNT
    for turn in range(TURNS):
        kb = first_kb + turn * KB + offs_kb
        next_data = data
        if TURNS > 1:
            next_data = _load_turn(
                w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, kb + KB, end_kb,
                F0, F1, F2, GROUPS, GROUP_SIZE, BLOCK_ROWS, W, RT, RL, EVEN=False,
            )  # fmt: skip
        # a block beyond the last has no weights: any activations will do
        turn_ptrs = x_ptrs + (tl.minimum(kb, K_BLOCKS - 1) * (8 * W))[:, None, None]
        if GROUPED:
            parts = _sum_groups(
                data, turn_ptrs, stride_xm, x_sums_ptr, x_zero_ptr, kb, M,
                F0, F1, F2, MULTIPLIER, GROUPS, GROUP_SIZE, W, RT, MP, INTERP,
            )  # fmt: skip
        else:
            parts = multiply_slices(
                data, turn_ptrs, stride_xm, M, 0, 8, F0, F1, F2, W, RT, MP, INTERP
            )
        totals = _added(totals, parts)
        data = next_data

    total = _joined_rows(totals, GROUPED, RL, COUNT)
    last = True
    if SPLIT_K > 1:
        partial_ptrs = partials_ptr + offs_m * stride_pm + offs_n
        total, last = _join_splits(
            total, partial_ptrs, M * stride_pm, offs_m < M, counters_ptr, SPLIT_K
        )
    if last:
        # int32 may wrap on the way; the result fits
        integer = total if GROUPED else MULTIPLIER * (total - w_sum * x_zero) - w_zero * x_sum
        y = (total if GROUPED else integer.to(tl.float32) * w_scale) * x_scale
        y = y + bias if HAS_BIAS else y
        out_ptrs = out_ptr + offs_m * stride_om + offs_n
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(offs_m < M) & mask_n)


@triton.jit
def _added(totals, parts):
    """Add two tuples of tiles."""
    sums = ()
    for i in tl.static_range(len(totals)):
        sums = sums + (totals[i] + parts[i],)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    return sums


@triton.jit
def _joined_rows(totals, GROUPED: tl.constexpr, RL: tl.constexpr, COUNT: tl.constexpr):
    """Sum every tile over its columns and put all beside each other: ``[RL, COUNT]``."""
    rows = ()
    for i in tl.static_range(COUNT):
        row = totals[i] if GROUPED else tl.sum(totals[i], axis=2)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005  as above
    # one sum over the warps serves all: the first tile and the one half a tuple later become
    # neighbours, and so on
    rows = _paired(_paired(_paired(_paired(rows))))
    rows = _paired(_paired(_paired(rows)))
    return tl.reshape(tl.sum(rows[0], axis=0), (RL, COUNT))


@triton.jit
def _paired(rows):
    """Join the tiles of the first half to those of the second, unless there is only one."""
    HALF: tl.constexpr = len(rows) // 2
    pairs = rows
    if HALF > 0:
        pairs = ()
        for i in tl.static_range(HALF):
            pairs = pairs + (tl.join(rows[i], rows[i + HALF]),)  # noqa: RUF005  no stars in Triton
    return pairs


@triton.jit
def _start_next(PDL: tl.constexpr):
    """Let the kernel that follows read its weights."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait_for_tokens(PDL: tl.constexpr):
    """Wait for the kernel before and what it wrote."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _join_splits(total, partial_ptrs, stride_ps, mask, counters_ptr, SPLIT_K: tl.constexpr):
    """Add the sums of all parts in their order, in whichever program is the last to bring one."""
    counter = counters_ptr + tl.program_id(0)
    tl.store(partial_ptrs + tl.program_id(1) * stride_ps, total, mask=mask)
    # the counter must not be seen before the sums of any thread
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counter, 0)
        total = tl.full(total.shape, 0, total.dtype)
        for split in tl.static_range(SPLIT_K):
            part_ptrs = partial_ptrs + split * stride_ps
            total += tl.load(part_ptrs, mask=mask, other=0, cache_modifier=".cg")
    return total, last


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
    RT: tl.constexpr,
    RL: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Load every run of a turn, lowest field first, then scales and zero-points of its groups.

    All of the first tile of rows come before those of the second.
    """
    RUN: tl.constexpr = BLOCK_ROWS * W
    valid = kb < end_kb
    offs = (kb * run_words)[:, None, None]
    data = ()
    for t in tl.static_range(RT):
        for r in tl.static_range(F0 + F1 + F2):
            if r < F0:
                ptrs = w0_ptrs + (offs * F0 + (r * RUN + t * RL * W))
            elif r < F0 + F1:
                ptrs = w1_ptrs + (offs * F1 + ((r - F0) * RUN + t * RL * W))
            else:
                ptrs = w2_ptrs + (offs * F2 + ((r - F0 - F1) * RUN + t * RL * W))
            if EVEN:
                words = tl.load(ptrs, eviction_policy="evict_first")
            else:
                words = tl.load(
                    ptrs, mask=valid[:, None, None], other=0, eviction_policy="evict_first"
                )
            data = data + (words,)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    if GROUPS > 1:
        data = data + _load_groups(
            scale_ptrs, zero_ptrs, kb, valid, GROUPS, 8 // (GROUP_SIZE // (4 * W)), RT, RL
        )  # fmt: skip
    return data


@triton.jit
def _load_groups(
    scale_ptrs, zero_ptrs, kb, valid,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    RT: tl.constexpr,
    RL: tl.constexpr,
):  # fmt: skip
    """Load scale and zero-point of every group of a turn, for one tile of rows after the other."""
    data = ()
    for t in tl.static_range(RT):
        for part in tl.static_range(PARTS):
            group = kb * PARTS + part
            # a group beyond the last counts nothing
            counts = (valid & (group < GROUPS))[:, None]
            group = t * RL * GROUPS + tl.minimum(group, GROUPS - 1)[:, None]
            scale = tl.load(scale_ptrs + group).to(tl.float32)
            zero = tl.load(zero_ptrs + group)
            data = data + (tl.where(counts, scale, 0.0), zero)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    return data


@triton.jit
def _sum_groups(
    data, x_ptrs, stride_xm, x_sums_ptr, x_zero_ptr, kb, M,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    W: tl.constexpr,
    RT: tl.constexpr,
    MP: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Scale the exact integer of every group of a turn: RT x MP tiles of float32 ``[KB, RL]``."""
    PARTS: tl.constexpr = 8 // (GROUP_SIZE // (4 * W))
    COUNT: tl.constexpr = 8 // PARTS
    SHIFT: tl.constexpr = 128 if F0 == 8 else 0
    RUNS: tl.constexpr = F0 + F1 + F2
    x_zeros = ()
    for m in tl.static_range(MP):
        x_zeros = x_zeros + (tl.load(x_zero_ptr + tl.minimum(m, M - 1)),)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    results = (tl.full((1, 1), 0, tl.float32),) * (RT * MP)
    for part in tl.static_range(PARTS):
        dots = multiply_slices(
            data, x_ptrs, stride_xm, M, part * COUNT, COUNT, F0, F1, F2, W, RT, MP, INTERP
        )
        group = tl.minimum(kb * PARTS + part, GROUPS - 1)[:, None]
        x_sums = ()
        for m in tl.static_range(MP):
            x_sum = tl.load(x_sums_ptr + tl.minimum(m, M - 1) * GROUPS + group)
            x_sums = x_sums + (x_sum - GROUP_SIZE * x_zeros[m],)  # type: ignore[assignment]  # noqa: RUF005  as above
        terms = ()
        for t in tl.static_range(RT):
            codes = add_codes(data, t * RUNS, part * COUNT, COUNT, F0, F1, F2, INTERP)
            scale = data[RT * RUNS + 2 * (t * PARTS + part)]
            zero = data[RT * RUNS + 2 * (t * PARTS + part) + 1].to(tl.int32) - SHIFT
            zero = MULTIPLIER * zero + MULTIPLIER - 1
            for m in tl.static_range(MP):
                dot = tl.sum(dots[t * MP + m] - codes * x_zeros[m], axis=2)
                integer = MULTIPLIER * dot - zero * x_sums[m]
                terms = terms + (integer.to(tl.float32) * scale,)  # type: ignore[assignment]  # noqa: RUF005  as above
        results = _added(results, terms)
    return results
