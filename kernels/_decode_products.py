"""Dot products of the decode kernel: codes of sliced words times words of int8 activations.

A word holds 32/f codes of a field; one mask leaves four of consecutive columns, a factor of `dp4a`.
Every tile of rows and every token has a chain of its own for every field: none waits for another,
and what words and activations become in between is shared.

Shape legend: W words in a slice, KB blocks of columns, RL rows beside each other, RT tiles of rows,
MP tokens; all tiles are int32 ``[KB, RL, W]``.
"""

import triton
import triton.language as tl

__all__ = ["add_codes", "multiply_slices"]


@triton.jit
def multiply_slices(
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
    """Sum codes times activations over COUNT slices, one chain a field: RT x MP tiles.

    Over whole blocks, codes of odd slices stay where a mask finds them, F bits up: one exact shift
    of their sums, in the middle of the chain, stands for a shift of every word.
    """
    IN_PLACE: tl.constexpr = COUNT == 8 and F0 < 8
    RUNS: tl.constexpr = F0 + F1 + F2
    none = tl.full((1, 1, 1), 0, tl.int32)
    sums = ((none, none, none),) * (RT * MP)
    for even in tl.static_range(2):
        for s in tl.static_range(FIRST, FIRST + COUNT):
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
    dots = ()
    for i in tl.static_range(RT * MP):
        dots = dots + (_joined(sums[i], F0, F1, F2),)  # type: ignore[assignment]  # noqa: RUF005  as above
    return dots


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
def add_codes(
    data,
    FIRST_RUN: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Sum the codes of COUNT slices: int32 ``[KB, RL, W]``."""
    none = tl.full((1, 1, 1), 0, tl.int32)
    sums = (none, none, none)
    for s in tl.static_range(FIRST, FIRST + COUNT):
        sums = _add_slice(
            data, FIRST_RUN, none + 0x01010101, sums, s, F0, F1, F2, IN_PLACE=False, INTERP=INTERP
        )
    return _joined(sums, F0, F1, F2)


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
