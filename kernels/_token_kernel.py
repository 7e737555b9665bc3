"""One program a token, or a few: what precedes a linear layer, and the codes that it reads.

    y = x | norm(x) | norm(residual + x) | gate(x)           `kernels.layer_math`
    low = min(min_k y, 0)          high = max(max_k y, 0)    `kernels.activation_quant`
    out = y | codes, scale, zero_point, sums                 `kernels.tokens`

A row is read once and stays in registers; a norm asks for all of it before the first use. Threads
meet once for a norm's sum (twice for a layer norm), once for the ends of the range, once for the
sum of codes.

PARTS programs share a gated token, SHARE columns each. A part keeps its y in registers, publishes
the range of it and waits for those of the others, so that all derive the same scale:

    slot = mark << 63 | bits of high << 32 | note << 31 | bits of -low         high >= 0, -low >= 0

One store publishes a whole range and one load takes it, so nothing else has to be ordered. A launch
gives the marks of its slots the other value; as no launch leaves one of them out, they are equal in
between, and a range has come when its mark is that of one's own. The sum of codes is added part by
part (integers, so their order is no matter): part 0 adds its own less what was there before, which
it has read before it publishes, and nobody adds before that.

Nobody waits forever: a part waits for parts of its own launch alone. Whatever runs before them ends
without them; a kernel behind may take no place until every part has begun, as each of them lets it
start only then; and the launcher keeps to as many parts as the GPU holds at once
(`kernels.token_parts`).

Division by the scale is correctly rounded without a division: with r = 1 / s, q = x r is corrected
twice by its remainder, q += (x - q s) r, which fused multiply-adds give exactly; what could
overflow or underflow there is far from a tie of two codes.

Shape legend: K features, L columns, S groups, BLOCK a power of two that holds K and L, or a share.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["token_kernel"]


@triton.jit
def token_kernel(
    x_ptr, stride_xm,
    residual_ptr, stride_rm,
    weight_ptr, bias_ptr,
    out_ptr, stride_om,
    total_ptr, stride_tm,
    scale_ptr, zero_ptr, sums_ptr,
    slots_ptr,
    eps,
    K: tl.constexpr,
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    RAPID: tl.constexpr,
    NATIVE_EXP: tl.constexpr,
    PDL: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Transform and quantize one token or a share: BITS 0 stores y in the dtype of x, no codes."""
    row = tl.program_id(0).to(tl.int64)
    part = part_of_token(PARTS)
    cols = part * SHARE + tl.arange(0, BLOCK)
    own = tl.arange(0, BLOCK) < SHARE
    mask = own & (cols < K)
    dtype = x_ptr.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
    weight, bias = mask, mask
    if NORM:
        # parameters do not depend on the kernel before
        weight, bias = _load_parameters(weight_ptr, bias_ptr, cols, mask, PROLOGUE)
    if PDL:
        gdc_wait()
    before, note = open_slot(slots_ptr, sums_ptr, row, part, BITS, GROUPS, PARTS)
    stored = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_rm + cols, mask=mask, other=0.0)
        stored = rounded(residual.to(tl.float32) + stored.to(tl.float32), dtype, INTERP)
        tl.store(total_ptr + row * stride_tm + cols, stored, mask=mask)
    y = stored.to(tl.float32)
    if NORM:
        y = _normalize(y, weight, bias, mask, eps, K, PROLOGUE, BLOCK, dtype, INTERP)
    elif PROLOGUE != "plain":
        up = tl.load(x_ptr + row * stride_xm + K + cols, mask=mask, other=0.0)
        active = rounded(gate(y, PROLOGUE, RAPID, NATIVE_EXP), dtype, INTERP)
        y = rounded(active.to(tl.float32) * up.to(tl.float32), dtype, INTERP).to(tl.float32)
    if BITS == 0:
        tl.store(out_ptr + row * stride_om + cols, y.to(dtype), mask=mask)
    else:
        y, low, high = finite_range(y, INTERP)
        low, high = meet(low, high, before, note, slots_ptr, row, part, PARTS, INTERP)
        scale, zero, codes = quantize_between(y, low, high, mask, BITS, RAPID)
        tl.store(out_ptr + row * stride_om + cols, codes.to(tl.int8), mask=own & (cols < L))
        store_scale(scale_ptr + row, zero_ptr + row, scale, zero, part)
        _store_sums(sums_ptr, codes, note, row, part, K, GROUPS, BLOCK, PARTS, SHARE)


@triton.jit
def quantize_row(y, mask, BITS: tl.constexpr, RAPID: tl.constexpr, INTERP: tl.constexpr):
    """Scale, zero-point and int32 codes of a whole token; zeros where masked.

    `y` is float32 of any shape, 0 where masked. Scale and zero-point are scalars.
    """
    y, low, high = finite_range(y, INTERP)
    return quantize_between(y, low, high, mask, BITS, RAPID)


@triton.jit
def finite_range(y, INTERP: tl.constexpr):
    """`y` as it is quantized, and its range: low <= 0 <= high."""
    # an infinity in the place of NaN reaches the scale, and comparisons keep their meaning
    y = tl.where(tl.abs(y) < float("inf"), y, float("inf"))
    low, high = _value_range(y, INTERP)
    return y, low, high


@triton.jit
def quantize_between(y, low, high, mask, BITS: tl.constexpr, RAPID: tl.constexpr):
    """Scale, zero-point and codes of values in a range."""
    scale, divisor = _token_scale(low, high, BITS, RAPID)
    inverse = tl.div_rn(1.0, divisor)
    zero = -_nearest(_ratio(low, divisor, inverse, RAPID))
    zero = tl.where(scale < float("inf"), zero, 0.0)
    STEPS: tl.constexpr = (1 << BITS) - 1
    codes = _nearest(_ratio(y, divisor, inverse, RAPID)) + zero
    codes = tl.minimum(tl.maximum(codes, 0.0), STEPS * 1.0)
    SHIFT: tl.constexpr = 128 if BITS == 8 else 0
    return scale, zero.to(tl.int32) - SHIFT, tl.where(mask, codes.to(tl.int32) - SHIFT, 0)


@triton.jit
def part_of_token(PARTS: tl.constexpr):
    """Which part a program is."""
    if PARTS == 1:
        return 0
    else:
        return tl.program_id(1)


@triton.jit
def open_slot(
    slots_ptr, sums_ptr, row, part,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """What a part's slot and its token's sum hold before the launch: asked for early."""
    before, note = row, row
    if PARTS > 1 and BITS > 0:
        # past the L1 cache, as others write both
        before = tl.load(slots_ptr + row * PARTS + part, cache_modifier=".cg")
        if GROUPS == 1:
            note = tl.load(sums_ptr + row, cache_modifier=".cg")
    return before, note


@triton.jit
def meet(
    low, high, before, note, slots_ptr, row, part, PARTS: tl.constexpr, INTERP: tl.constexpr
):  # fmt: skip
    """Publish the range of a part and return that of its whole token."""
    if PARTS > 1:
        ranges = _exchange(low, high, before, note, slots_ptr + row * PARTS, part, PARTS, INTERP)
        # as integers, non-negative floats have the same order
        lows = (ranges & 0x7FFFFFFF).to(tl.int32)
        highs = ((ranges >> 32) & 0x7FFFFFFF).to(tl.int32)
        low = 0.0 - tl.max(lows, 0).to(tl.float32, bitcast=True)
        high = tl.max(highs, 0).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _exchange(
    low, high, before, note, token_ptr, part, PARTS: tl.constexpr, INTERP: tl.constexpr
):  # fmt: skip
    """Fill one's own slot and return what all of them hold, int64 ``[32]``."""
    low_bits = tl.abs(low).to(tl.int32, bitcast=True).to(tl.int64)
    high_bits = tl.abs(high).to(tl.int32, bitcast=True).to(tl.int64)
    mark = ((before >> 63) + 1) << 63
    # a bit of the note: the store has to wait until the load of it is back
    note_bit = (note.to(tl.int64) & 1) << 31
    published = mark | (high_bits << 32) | note_bit | low_bits
    # a slot a lane, again from the first on: a whole warp has its maximum in one instruction
    slots = token_ptr + tl.arange(0, 32) % PARTS
    if INTERP:
        # one program after another: the launcher runs them twice, the second time all have met
        tl.store(token_ptr + part, published)
        return tl.load(slots)
    else:
        tl.atomic_xchg(token_ptr + part, published, sem="relaxed")
        return _wait_for(slots, published)


@triton.jit
def store_scale(scale_ptr, zero_ptr, scale, zero, part):
    """Once a token."""
    if part == 0:
        tl.store(scale_ptr, scale)
        tl.store(zero_ptr, zero)


@triton.jit
def store_sum(sum_ptr, total, note, part, PARTS: tl.constexpr):
    """The sum of a token's codes, or a part's share of it."""
    if PARTS == 1:
        tl.store(sum_ptr, total)
    else:
        tl.atomic_add(sum_ptr, total - tl.where(part == 0, note, 0), sem="relaxed")


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERP: tl.constexpr):
    """float32 in the model's dtype, half to even."""
    if INTERP and dtype == tl.bfloat16:
        # the interpreter cuts off what a GPU rounds
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _load_parameters(weight_ptr, bias_ptr, cols, mask, KIND: tl.constexpr):
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = weight
    if KIND == "layer":
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _normalize(
    x, weight, bias, mask, eps,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    dtype: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """float32 ``[BLOCK]`` that the model's dtype holds; zeros where masked."""
    if KIND == "layer":
        x = tl.where(mask, x - _mean(x, K, BLOCK), 0.0)
    power = _mean(x * x, K, BLOCK)
    y = x * tl.div_rn(1.0, tl.sqrt_rn(power + eps))
    if KIND == "rms":
        y = weight * rounded(y, dtype, INTERP).to(tl.float32)
    elif KIND == "rms_plus_one":
        y = y * (weight + 1.0)
    else:
        y = y * weight + bias
    return rounded(y, dtype, INTERP).to(tl.float32)


@triton.jit
def _store_sums(
    sums_ptr, codes, note, row, part,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    if GROUPS == 1:
        store_sum(sums_ptr + row, tl.sum(codes, 0), note, part, PARTS)
    else:
        SIZE: tl.constexpr = K // GROUPS
        tl.static_assert(BLOCK % SIZE == 0, "a group is a power of two")
        own = tl.arange(0, BLOCK // SIZE)
        groups = part * (SHARE // SIZE) + own
        sums = tl.sum(tl.reshape(codes, (BLOCK // SIZE, SIZE)), 1)
        mask = (own < SHARE // SIZE) & (groups < GROUPS)
        tl.store(sums_ptr + row * GROUPS + groups, sums, mask=mask)


@triton.jit
def _wait_for(slots, published):
    """Contents of slots, each once its mark is that of one's own."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred differs;
            .reg .b64 marks;
        again:
            ld.relaxed.gpu.global.b64 $0, [$1];
            xor.b64 marks, $0, $2;
            setp.lt.s64 differs, marks, 0;
            @differs bra again;
        }
        """,
        "=&l,l,l", [slots.to(tl.int64), published], dtype=tl.int64, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _value_range(x, INTERP: tl.constexpr):
    """The least and the largest value, zero among them, in one reduction."""
    if INTERP:
        low = tl.min(x)
        high = tl.max(x)
    else:
        low, high = tl.reduce((x, x), None, _wider)
    return tl.minimum(low, 0.0), tl.maximum(high, 0.0)


@triton.jit
def _token_scale(low, high, BITS: tl.constexpr, RAPID: tl.constexpr):
    """Scale and what to divide by: NaN and 1 where the range is not finite."""
    STEPS: tl.constexpr = (1 << BITS) - 1
    span = high - low
    if RAPID:
        step = _corrected(span, span * (1.0 / STEPS), 1.0 / STEPS, STEPS * 1.0)
    else:
        step = tl.div_rn(span, STEPS * 1.0)
    finite = span < float("inf")
    divisor = tl.where(finite, tl.maximum(step, 1e-5), 1.0)
    return tl.where(finite, divisor, float("nan")), divisor


@triton.jit
def _ratio(x, divisor, inverse, RAPID: tl.constexpr):
    # both ends of the product are normal numbers: 1e-5 <= divisor < 2.7e36
    if RAPID:
        return _corrected(x, x * inverse, inverse, divisor)
    else:
        return tl.div_rn(x, divisor)


@triton.jit
def gate(x, KIND: tl.constexpr, RAPID: tl.constexpr, NATIVE_EXP: tl.constexpr):
    """``x / (1 + exp(-slope))`` of float32; RAPID rounds correctly without a division."""
    slope = x
    if KIND == "gelu_tanh":
        slope = (x + x * x * x * 0.044715) * 1.5957691216057308
    exponent = tl.minimum(tl.maximum(slope * -1.4426950408889634, -100.0), 100.0)
    if NATIVE_EXP:
        return x / (1.0 + tl.exp2(exponent))
    divisor = 1.0 + _exp2(exponent)
    if RAPID:
        inverse = _reciprocal(divisor)
        return _corrected(x, x * inverse, inverse, divisor)
    return tl.div_rn(x, divisor)


@triton.jit
def _nearest(x):
    """The nearest integer, half to even, of ``|x| < 2^22``."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _corrected(x, ratio, inverse, divisor):
    # a negation is an instruction: of the divisor it is one for both, and one for a whole row
    negative = -divisor
    ratio = tl.fma(tl.fma(ratio, negative, x), inverse, ratio)
    return tl.fma(tl.fma(ratio, negative, x), inverse, ratio)


@triton.jit
def _reciprocal(x):
    """1 / x of normal numbers whose inverse is normal, from the hardware's estimate."""
    estimate = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.fma(estimate, tl.fma(-x, estimate, 1.0), estimate)


@triton.jit
def _exp2(x):
    shifted = x + 12582912.0
    fraction = x - (shifted - 12582912.0)
    value = 0.0013390863314270973 * fraction + 0.009676031768321991
    value = value * fraction + 0.055503569543361664
    value = value * fraction + 0.2402210682630539
    value = value * fraction + 0.6931471824645996
    value = value * fraction + 1.0000001192092896
    # the shifted number ends in the bits of n; shifting drops its own exponent
    power = shifted.to(tl.int32, bitcast=True) << 23
    return (value.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)


@triton.jit
def _mean(x, K: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of float32 ``[BLOCK]``: neighbours as a tree, the rest in float64."""
    left, right = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    left, right = tl.split(tl.reshape(left + right, (BLOCK // 4, 2)))
    left, right = tl.split(tl.reshape(left + right, (BLOCK // 8, 2)))
    # a constexpr takes the dtype of what it multiplies: float64
    return (tl.sum((left + right).to(tl.float64), 0) * (1.0 / K)).to(tl.float32)


@triton.jit
def _wider(low_a, high_a, low_b, high_b):
    return tl.minimum(low_a, low_b), tl.maximum(high_a, high_b)
