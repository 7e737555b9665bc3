"""Dot products of the decode kernel: codes of sliced words times words of int8 activations.

A word holds 32/f codes of a field; one mask leaves four of consecutive columns, a factor of `dp4a`.
Every tile of rows and every token has a chain of its own for every field: none waits for another,
and what words and activations become in between is shared.

With scales in groups, every lane keeps a float of its own for each row and token:

    total  <-  fma(s_w float(c S - z_w R), total)      S, R over the lane's own columns of a group

R comes from the activations the lane holds, one more dot product for all of its rows; c S - z_w R
is an exact int32. Nothing crosses lanes before the end, and what z_x brings, the sum over groups of
s_w (c C - G z_w), is a number of the row that the weight keeps. Scales and zero-points of a row's
neighbouring groups come as one word each, up to four groups in it: 24 bits a group in all.

Shape legend: W words in a slice, KB blocks of columns, RL rows beside each other, RT tiles of rows,
MP tokens; all tiles are int32 ``[KB, RL, W]``.
"""

import triton
import triton.language as tl

__all__ = ["load_groups", "multiply_groups", "multiply_slices"]


@triton.jit
def multiply_slices(
    data, x_ptrs, stride_xm, M,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    W: tl.constexpr,
    RT: tl.constexpr,
    MP: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Sum codes times activations over the slices of a block, one chain a field: RT x MP tiles.

    Codes of odd slices stay where a mask finds them, F bits up: one exact shift
    of their sums, in the middle of the chain, stands for a shift of every word.
    """
    IN_PLACE: tl.constexpr = F0 < 8
    RUNS: tl.constexpr = F0 + F1 + F2
    none = tl.full((1, 1, 1), 0, tl.int32)
    sums = ((none, none, none),) * (RT * MP)
    for even in tl.static_range(2):
        for s in tl.static_range(8):
            if s % 2 != even:
                tokens = _load_tokens(x_ptrs + s * W, stride_xm, M, MP)
                new = ()
                for t in tl.static_range(RT):
                    for m in tl.static_range(MP):
                        one = _add_slice(
                            data, t * RUNS, tokens[m], sums[t * MP + m], s,
                            F0, F1, F2, IN_PLACE, INTERP,
                        )  # fmt: skip
                        new = new + (one,)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
                sums = new
        if even == 0 and IN_PLACE:
            sums = _moved_down(sums, F0, F1, F2)
    return _all_joined(sums, F0, F1, F2)


@triton.jit
def load_groups(
    scale_ptrs, zero_ptrs, kb, valid,
    ROW_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    RT: tl.constexpr,
    RL: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Load the scales and zero-points of a turn: WORDS words of each ``[KB, RL]``, RT times.

    Unless ALL blocks and groups are there, those beyond the last have a scale of zero.
    """
    data = ()
    for t in tl.static_range(RT):
        for i in tl.static_range(WORDS):
            word = kb * WORDS + i
            counts = (valid & (word < ROW_WORDS))[:, None]
            word = word if ALL else tl.minimum(word, ROW_WORDS - 1)
            word = word[:, None] + t * RL * ROW_WORDS
            scales = tl.load(scale_ptrs + word)
            scales = scales if ALL else tl.where(counts, scales, 0)
            data = data + (scales, tl.load(zero_ptrs + word))  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    return data


@triton.jit
def multiply_groups(
    data, x_ptrs, stride_xm, M, totals,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    PARTS: tl.constexpr,
    WORD_GROUPS: tl.constexpr,
    W: tl.constexpr,
    RT: tl.constexpr,
    MP: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Add the scaled sums of the PARTS groups of a block to RT x MP float tiles."""
    FIRST: tl.constexpr = RT * (F0 + F1 + F2)
    WORDS: tl.constexpr = PARTS // WORD_GROUPS
    SHIFT: tl.constexpr = 128 if F0 == 8 else 0
    for part in tl.static_range(PARTS):
        dots, x_sums = _multiply_part(
            data, x_ptrs, stride_xm, M, part * (8 // PARTS), 8 // PARTS,
            F0, F1, F2, W, RT, MP, INTERP,
        )  # fmt: skip
        new = ()
        for t in tl.static_range(RT):
            scales = data[FIRST + 2 * (t * WORDS + part // WORD_GROUPS)]
            zeros = data[FIRST + 2 * (t * WORDS + part // WORD_GROUPS) + 1]
            scale = _scale_of(scales, part % WORD_GROUPS, WORD_GROUPS)[:, :, None]
            zero = _zero_of(zeros, part % WORD_GROUPS)[:, :, None] - SHIFT
            zero = MULTIPLIER * zero + (MULTIPLIER - 1)
            for m in tl.static_range(MP):
                value = MULTIPLIER * _lane_sum(dots[t * MP + m]) - zero * x_sums[m]
                total = tl.fma(value.to(tl.float32), scale, totals[t * MP + m])
                new = new + (total,)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
        totals = new
    return totals


@triton.jit
def _multiply_part(
    data, x_ptrs, stride_xm, M,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    W: tl.constexpr,
    RT: tl.constexpr,
    MP: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Sum codes times activations over COUNT slices, and those activations a lane."""
    none = tl.full((1, 1, 1), 0, tl.int32)
    sums = ((none, none, none),) * (RT * MP)
    x_sums = (none,) * MP
    for s in tl.static_range(FIRST, FIRST + COUNT):
        tokens = _load_tokens(x_ptrs + s * W, stride_xm, M, MP)
        new, new_x = (), ()
        for m in tl.static_range(MP):
            x_sum = _dp4a(none + 0x01010101, tokens[m], x_sums[m], SIGNED=False, INTERP=INTERP)
            new_x = new_x + (x_sum,)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
        for t in tl.static_range(RT):
            for m in tl.static_range(MP):
                one = _add_slice(
                    data, t * (F0 + F1 + F2), tokens[m], sums[t * MP + m], s,
                    F0, F1, F2, IN_PLACE=False, INTERP=INTERP,
                )  # fmt: skip
                new = new + (one,)  # type: ignore[assignment]  # noqa: RUF005  as above
        sums, x_sums = new, new_x
    lanes = ()
    for m in tl.static_range(MP):
        lanes = lanes + (_lane_sum(x_sums[m]),)  # type: ignore[assignment]  # noqa: RUF005  as above
    return _all_joined(sums, F0, F1, F2), lanes


@triton.jit
def _lane_sum(tile):
    """Sum the words of one load, which one lane holds: ``[.., .., W]`` to ``[.., .., W / 4]``."""
    KB: tl.constexpr = tile.shape[0]
    RL: tl.constexpr = tile.shape[1]
    QUADS: tl.constexpr = tile.shape[2] // 4
    return tl.sum(tl.reshape(tile, (KB, RL, QUADS, 4)), axis=3)


@triton.jit
def _scale_of(word, PLACE: tl.constexpr, WORD_GROUPS: tl.constexpr):
    """One scale of a word of scales, as float32."""
    BITS: tl.constexpr = word.dtype.primitive_bitwidth // WORD_GROUPS
    bits = word >> (BITS * PLACE)
    if BITS == 16:
        scale = bits.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        scale = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def _zero_of(word, PLACE: tl.constexpr):
    return (word >> (8 * PLACE)).to(tl.int32) & 0xFF


@triton.jit
def _load_tokens(x_ptrs, stride_xm, M, MP: tl.constexpr):
    """Load the same columns of every token; beyond the last it is repeated."""
    tokens = ()
    for m in tl.static_range(MP):
        x = tl.load(x_ptrs + tl.minimum(m, M - 1) * stride_xm, eviction_policy="evict_last")
        tokens = tokens + (x,)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    return tokens


@triton.jit
def _moved_down(sums, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr):
    """Bring sums of codes that were F bits up to the place of the others."""
    moved = ()
    for i in tl.static_range(len(sums)):
        sum0, sum1, sum2 = sums[i]
        moved = moved + ((sum0 >> F0, sum1 >> F1, sum2 >> F2),)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    return moved


@triton.jit
def _add_slice(
    data,
    FIRST_RUN: tl.constexpr,
    x, sums,
    s: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    IN_PLACE: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Carry the chain of every field on by one slice."""
    sum0, sum1, sum2 = sums
    sum0 = _dp4a(_codes(data, s, FIRST_RUN, F0, IN_PLACE), x, sum0, F0 == 8, INTERP)
    if F1:
        codes = _codes(data, s, FIRST_RUN + F0, F1, IN_PLACE)
        sum1 = _dp4a(codes, x, sum1, F1 == 8, INTERP)
    if F2:
        codes = _codes(data, s, FIRST_RUN + F0 + F1, F2, IN_PLACE)
        sum2 = _dp4a(codes, x, sum2, F2 == 8, INTERP)
    return sum0, sum1, sum2


@triton.jit
def _codes(
    data,
    s: tl.constexpr,
    FIRST_RUN: tl.constexpr,
    F: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Four codes a word of one slice; in place, those of odd slices F bits up."""
    words = data[FIRST_RUN + s // (8 // F)]
    if F < 8:
        PLACE: tl.constexpr = s % (8 // F)
        UP: tl.constexpr = PLACE % 2 if IN_PLACE else 0
        MASK: tl.constexpr = (0x01010101 * ((1 << F) - 1)) << (F * UP)
        # the mask as a signed word
        SIGNED: tl.constexpr = (MASK ^ 0x80000000) - 0x80000000
        words = (words >> (F * (PLACE - UP))) & SIGNED
    return words


@triton.jit
def _all_joined(sums, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr):
    dots = ()
    for i in tl.static_range(len(sums)):
        dots = dots + (_joined(sums[i], F0, F1, F2),)  # type: ignore[assignment]  # noqa: RUF005  no stars in Triton
    return dots


@triton.jit
def _joined(sums, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr):
    """Put the sums of fields in their places."""
    total, sum1, sum2 = sums
    if F1:
        total += sum1 << F0
    if F2:
        total += sum2 << (F0 + F1)
    return total


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
