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
two barriers a slice. With group scales the lanes that share a row are summed once, at the end:
`kernels._decode_products` says how.

Shape legend: M tokens, MP their next power of two, N outputs, NP rows padded to BN, L columns,
G bytes in a slice, W = G / 4, KB blocks of 8G columns, S scale groups.
"""

import triton
import triton.language as tl

from kernels._decode_products import load_groups, multiply_groups, multiply_slices

__all__ = ["decode_linear_kernel"]


@triton.jit
def decode_linear_kernel(
    x_ptr, stride_xm,
    x_scale_ptr, x_zero_ptr, x_sums_ptr,
    w0_ptr, w1_ptr, w2_ptr, run_words,
    w_scale_ptr, w_zero_ptr, zero_codes_ptr, w_sums_ptr, terms_ptr,
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
    WORD_GROUPS: tl.constexpr,
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
    PARTS: tl.constexpr = 32 * W // GROUP_SIZE
    COUNT: tl.constexpr = RT * MP
    _start_next(PDL)
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
    # words of scales and of zero-points, WORD_GROUPS groups in each
    row_words = (first_row + lane)[None, :] * (GROUPS // WORD_GROUPS)
    scale_ptrs, zero_ptrs = w_scale_ptr + row_words, zero_codes_ptr + row_words

    data = _load_turn(
        w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, first_kb + offs_kb, end_kb,
        F0, F1, F2, GROUPS, PARTS, WORD_GROUPS, K_BLOCKS, BLOCK_ROWS, W, RT, RL, EVEN,
    )  # fmt: skip
    # what a row needs at the end, every token beside the others; scales of groups come with a turn
    place = tl.arange(0, COUNT)[None, :]
    offs_n = first_row + place // MP * RL + lane[:, None]
    mask_n = offs_n < N
    w_scale = 0.0 if GROUPED else tl.load(w_scale_ptr + offs_n).to(tl.float32)
    w_zero = 0 if GROUPED else tl.load(w_zero_ptr + offs_n)
    w_sum = tl.load(terms_ptr + offs_n) if GROUPED else tl.load(w_sums_ptr + offs_n)
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

    # lanes stay apart until the end: with groups, those that hold the words of one load are one
    none = tl.full((KB, RL, W), 0, tl.int32)
    if GROUPED:
        none = tl.full((KB, RL, W // 4), 0.0, tl.float32)
    totals = (none,) * COUNT
    for turn in range(TURNS):
        kb = first_kb + turn * KB + offs_kb
        next_data = data
        if TURNS > 1:
            next_data = _load_turn(
                w0_ptrs, w1_ptrs, w2_ptrs, run_words, scale_ptrs, zero_ptrs, kb + KB, end_kb,
                F0, F1, F2, GROUPS, PARTS, WORD_GROUPS, K_BLOCKS, BLOCK_ROWS, W, RT, RL, EVEN=False,
            )  # fmt: skip
        # a block beyond the last has no weights: any activations will do
        turn_ptrs = x_ptrs + (tl.minimum(kb, K_BLOCKS - 1) * (8 * W))[:, None, None]
        if GROUPED:
            totals = multiply_groups(
                data, turn_ptrs, stride_xm, M, totals,
                F0, F1, F2, MULTIPLIER, PARTS, WORD_GROUPS, W, RT, MP, INTERP,
            )  # fmt: skip
        else:
            parts = multiply_slices(data, turn_ptrs, stride_xm, M, F0, F1, F2, W, RT, MP, INTERP)
            totals = _added(totals, parts)
        data = next_data

    total = _joined_rows(totals, RL, COUNT)
    last = True
    if SPLIT_K > 1:
        partial_ptrs = partials_ptr + offs_m * stride_pm + offs_n
        total, last = _join_splits(
            total, partial_ptrs, M * stride_pm, offs_m < M, counters_ptr, SPLIT_K
        )
    if last:
        if GROUPED:
            y = total - w_sum * x_zero.to(tl.float32)
        else:
            # int32 may wrap on the way; the result fits
            integer = MULTIPLIER * (total - w_sum * x_zero) - w_zero * x_sum
            y = integer.to(tl.float32) * w_scale
        y = y * x_scale
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
def _joined_rows(totals, RL: tl.constexpr, COUNT: tl.constexpr):
    """Sum every tile over its columns and put all beside each other: ``[RL, COUNT]``."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.sum(totals[i], axis=2),)  # type: ignore[assignment]  # noqa: RUF005  as above
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
    PARTS: tl.constexpr,
    WORD_GROUPS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
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
        data = data + load_groups(
            scale_ptrs, zero_ptrs, kb, valid, GROUPS // WORD_GROUPS, PARTS // WORD_GROUPS, RT, RL,
            ALL=EVEN and GROUPS == PARTS * K_BLOCKS,
        )  # fmt: skip
    return data
