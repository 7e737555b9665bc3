"""The kernels of `kernels.sampling`: one program for a row and a slice of the vocabulary.

A logit's key is an integer in the order of the logits: the bits of the float32, negative numbers
turned over, less the bits that its dtype leaves empty. A search finds one digit of the key of a
threshold a launch; every program adds up what all slices of the launch before counted, so there is
no atomic and no order of arrival.

Shape legend: M rows, V vocabulary, SPLITS slices, RADIX values of a digit.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["choose_kernel", "draw_kernel", "peak_kernel", "search_kernel"]


@triton.jit
def peak_kernel(
    logits_ptr, stride_lm,
    peaks_ptr,
    V,
    SLICE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The largest logit of a slice: ``peaks[row, split]``."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    _follow(PDL)
    peak = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for first in range(0, SLICE, BLOCK):
        offs = split * SLICE + first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * stride_lm + offs, mask=offs < V, other=float("-inf"))
        peak = tl.maximum(peak, logits.to(tl.float32))
    tl.store(peaks_ptr + row * SPLITS + split, tl.max(peak, 0))


@triton.jit(do_not_specialize=["M", "level"])
def search_kernel(
    logits_ptr, stride_lm,
    slots_ptr, temperature_ptr, limit_ptr, peaks_ptr,
    bases_ptr, sums_ptr,
    count_limit_ptr, count_bases_ptr, count_sums_ptr, lowest_ptr,
    M, V, level,
    FIRST: tl.constexpr,
    LEVELS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    MASS: tl.constexpr,
    AFTER_COUNT: tl.constexpr,
    SLOTTED: tl.constexpr,
    SLICE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Weigh what a slice holds from each of RADIX keys on: ``sums[level, row, split, RADIX]``.

    FIRST says that the level is 0, which has none before it; the others share one compilation.
    Weights are ones, or with MASS the probabilities among the tokens that a count left. Rows that
    are greedy or without a limit write no sums.
    """
    RADIX: tl.constexpr = 1 << DIGIT_BITS
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    _follow(PDL)
    slot = slot_of(slots_ptr, row, SLOTTED)
    temperature = tl.load(temperature_ptr + slot)
    limit = tl.load(limit_ptr + slot)
    base = tl.full((), -(1 << (DIGIT_BITS * LEVELS - 1)), dtype=tl.int64)
    if not FIRST:
        base = threshold(
            limit, bases_ptr, sums_ptr, row, M, level, LEVELS, DIGIT_BITS, MASS, SPLITS
        )  # fmt: skip
    # every program of the row writes the same
    tl.store(bases_ptr + level * M + row, base)
    lowest = base
    peak = 0.0
    if MASS:
        peak = tl.max(tl.load(peaks_ptr + row * SPLITS + tl.arange(0, SPLITS)), 0)
    if AFTER_COUNT:
        if FIRST:
            lowest = threshold(
                tl.load(count_limit_ptr + slot), count_bases_ptr, count_sums_ptr, row, M,
                LEVELS, LEVELS=LEVELS, DIGIT_BITS=DIGIT_BITS, MASS=False, SPLITS=SPLITS,
            )  # fmt: skip
            tl.store(lowest_ptr + row, lowest)
        else:
            lowest = tl.maximum(lowest, tl.load(lowest_ptr + row))
    if (temperature >= 1e-5) & is_limited(limit, MASS):
        digits = tl.arange(0, RADIX)
        found = tl.full((BLOCK, RADIX), 0, dtype=tl.int64)
        for first in range(0, SLICE, BLOCK):
            offs = split * SLICE + first + tl.arange(0, BLOCK)
            mask = offs < V
            logits = tl.load(logits_ptr + row * stride_lm + offs, mask=mask, other=0.0)
            logits = logits.to(tl.float32)
            keys = order_key(logits, KEY_SHIFT)
            weights = tl.where(
                mask & (keys >= lowest), _weights(logits, peak, temperature, MASS), 0
            )
            # keys beyond the last digit count for all digits, those before the first for none
            digit = (keys - base) >> (DIGIT_BITS * (LEVELS - 1 - level))
            digit = tl.minimum(tl.maximum(digit, -1), RADIX - 1).to(tl.int32)
            found += tl.where(digit[:, None] >= digits[None, :], weights[:, None], 0)
        sums_ptrs = sums_ptr + ((level * M + row) * SPLITS + split) * RADIX + digits
        tl.store(sums_ptrs, tl.sum(found, 0))


@triton.jit(do_not_specialize=["M"])
def draw_kernel(
    logits_ptr, stride_lm,
    slots_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    peaks_ptr, count_bases_ptr, count_sums_ptr, mass_bases_ptr, mass_sums_ptr,
    scores_ptr, ids_ptr,
    M, V,
    LEVELS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    SLOTTED: tl.constexpr,
    SLICE: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The best token of a slice and its score; a logit that is NaN or infinity scores infinity."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    _follow(PDL)
    slot = slot_of(slots_ptr, row, SLOTTED)
    temperature = tl.load(temperature_ptr + slot)
    greedy = temperature < 1e-5
    scale = tl.where(greedy, 1.0, temperature)
    seed = tl.load(seed_ptr + slot)
    position = tl.load(position_ptr + slot).to(tl.uint32)
    least = tl.full((), -2147483648, dtype=tl.int64)
    if HAS_COUNT:
        count = threshold(
            tl.load(top_k_ptr + slot), count_bases_ptr, count_sums_ptr, row, M,
            LEVELS, LEVELS=LEVELS, DIGIT_BITS=DIGIT_BITS, MASS=False, SPLITS=SPLITS,
        )  # fmt: skip
        least = tl.maximum(least, count)
    if HAS_MASS:
        mass = threshold(
            tl.load(top_p_ptr + slot), mass_bases_ptr, mass_sums_ptr, row, M,
            LEVELS, LEVELS=LEVELS, DIGIT_BITS=DIGIT_BITS, MASS=True, SPLITS=SPLITS,
        )  # fmt: skip
        least = tl.maximum(least, mass)
    lowest = tl.full((), float("-inf"), dtype=tl.float32)
    if HAS_MIN_P:
        min_p = tl.load(min_p_ptr + slot)
        peak = tl.max(tl.load(peaks_ptr + row * SPLITS + tl.arange(0, SPLITS)), 0)
        bound = peak + scale * tl.log(tl.maximum(min_p, 1e-30))
        lowest = tl.where(min_p > 0, bound, lowest)
    lanes = tl.arange(0, LANES)
    best = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    best_id = tl.full((LANES,), 0, dtype=tl.int32) + V
    for first in range(0, SLICE, 4 * LANES):
        start = split * SLICE + first
        # one Philox call gives four words: for a lane of each quarter of the tile
        counter = (start // 4 + lanes).to(tl.uint32)
        zeros = counter * 0
        words = philox(seed, counter, zeros + position)
        for quarter in tl.static_range(4):
            offs = start + quarter * LANES + lanes
            mask = offs < V
            logits = tl.load(logits_ptr + row * stride_lm + offs, mask=mask, other=float("-inf"))
            logits = logits.to(tl.float32)
            kept = (order_key(logits, KEY_SHIFT) >= least) & (logits >= lowest)
            noisy = logits / scale + gumbel(words[quarter])
            score = tl.where(greedy, logits, tl.where(kept, noisy, float("-inf")))
            # a comparison with NaN is false
            score = tl.where(logits < float("inf"), score, float("inf"))
            better = score > best
            best = tl.where(better, score, best)
            best_id = tl.where(better, offs, best_id)
    top = tl.max(best, 0)
    tl.store(scores_ptr + row * SPLITS + split, top)
    tl.store(ids_ptr + row * SPLITS + split, tl.min(tl.where(best == top, best_id, V), 0))


@triton.jit
def choose_kernel(
    scores_ptr, ids_ptr, slots_ptr,
    tokens_ptr, position_ptr,
    V,
    SLOTTED: tl.constexpr,
    ADVANCE: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The best token of a row: the lowest id among equals, -1 where no logit was usable.

    With ADVANCE the row's position moves on by one.
    """
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    _follow(PDL)
    scores = tl.load(scores_ptr + row * SPLITS + splits)
    ids = tl.load(ids_ptr + row * SPLITS + splits)
    top = tl.max(scores, 0)
    token = tl.min(tl.where(scores == top, ids, V), 0)
    usable = (tl.abs(top) < float("inf")) & (token < V)
    tl.store(tokens_ptr + row, tl.where(usable, token, -1))
    if ADVANCE:
        slot = slot_of(slots_ptr, row, SLOTTED)
        tl.store(position_ptr + slot, tl.load(position_ptr + slot) + 1)


@triton.jit
def slot_of(slots_ptr, row, SLOTTED: tl.constexpr):
    """int64: where a row's parameters lie."""
    if SLOTTED:
        return tl.load(slots_ptr + row)
    else:
        return row


@triton.jit
def order_key(logits, KEY_SHIFT: tl.constexpr):
    """int64 keys in the order of float32 logits; both zeros have one."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> KEY_SHIFT).to(tl.int64)


@triton.jit
def is_limited(limit, MASS: tl.constexpr):
    """Whether a row's top_p or top_k leaves anything out."""
    if MASS:
        return limit < 1
    else:
        return limit > 0


@triton.jit
def _weights(logits, peak, temperature, MASS: tl.constexpr):
    """int64 ones, or probabilities relative to the peak's in units of 2^-40."""
    if MASS:
        return (tl.exp((logits - peak) / temperature) * 1099511627776.0).to(tl.int64)
    else:
        return tl.full(logits.shape, 1, dtype=tl.int64)


@triton.jit
def philox(seed, counter, position):
    """Four uint32 words of Philox 4x32-10: key `seed`, counter (`counter`, `position`, 0, 0)."""
    zeros = counter * 0
    a, b, c, d = counter, position, zeros, zeros
    low = zeros + (seed & 0xFFFFFFFF).to(tl.uint32)
    high = zeros + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        first = a.to(tl.uint64) * 0xD2511F53
        second = c.to(tl.uint64) * 0xCD9E8D57
        a = (second >> 32).to(tl.uint32) ^ b ^ low
        c = (first >> 32).to(tl.uint32) ^ d ^ high
        b = second.to(tl.uint32)
        d = first.to(tl.uint32)
        low += 0x9E3779B9
        high += 0xBB67AE85
    return a, b, c, d


@triton.jit
def gumbel(words):
    """Gumbel noise -log(-log(1 - u)) of uint32 words, u = (word + 1/2) / 2^32.

    The largest noise comes from the smallest u, where float32 is finest.
    """
    u = words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    near = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    far = -tl.log(tl.maximum(1.0 - u, 1e-8))
    return -tl.log(tl.where(u < 0.01, near, far))


@triton.jit
def threshold(
    limit, bases_ptr, sums_ptr, row, M, level,
    LEVELS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    MASS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """int64 key of a row's threshold: the digits before `level`, the largest that hold the limit.

    The level is at least 1.
    """
    RADIX: tl.constexpr = 1 << DIGIT_BITS
    digits = tl.arange(0, RADIX)
    splits = tl.arange(0, SPLITS)
    if MASS:
        # the first sum of the first level is the whole row's
        whole = tl.sum(tl.load(sums_ptr + row * SPLITS * RADIX + splits * RADIX), 0)
        wanted = tl.ceil(limit.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
        wanted = tl.maximum(wanted, 1)
    else:
        wanted = limit.to(tl.int64)
    slots = splits[:, None] * RADIX + digits[None, :]
    before = sums_ptr + ((level - 1) * M + row) * SPLITS * RADIX
    sums = tl.sum(tl.load(before + slots), 0)
    # sums fall with the digit
    chosen = tl.maximum(tl.sum((sums >= wanted).to(tl.int64), 0) - 1, 0)
    found = tl.load(bases_ptr + (level - 1) * M + row)
    found += chosen << (DIGIT_BITS * (LEVELS - level))
    base = tl.full((), -(1 << (DIGIT_BITS * LEVELS - 1)), dtype=tl.int64)
    return tl.where(is_limited(limit, MASS), found, base)


@triton.jit
def _follow(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
