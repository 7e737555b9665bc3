"""The kernel of `kernels.prefill_linear` for weights whose columns have scales in groups.

    S[m,n,g] = sum_{k in g} u_x[m,k] (c u_w[n,k] - z_w[n,g])                            int32
    Y[m,n]   = s_x[m] (sum_g s_w[n,g] S[m,n,g] - z_x[m] C[n]) + bias[n]                 float32
    C[n]     = sum_g s_w[n,g] sum_{k in g} (c u_w[n,k] - z_w[n,g])

Zero-points leave the codes while those are unpacked, four to an instruction, and with them every
term that would need a product of its own in each group. What is left of a group is one integer and
one float instruction for each output:

    a positive integer i below 2^23, its bits read as float32, is the subnormal number i 2^-149
    even groups   bits S + B              ->   ( S + B) 2^-149        B = 2^b >= |S|
    odd groups    bits 2^31 + B - S       ->   (-B + S) 2^-149        the sign bit is the 2^31
    total         <- fma(that, 2^100 s_w, total)                      rounded once

Conversions are exact. Signs alternate so that what B adds does not pile up; `terms` says what is
left of it. 2^100 keeps products normal and leaves with 2^49 at the end. With SUBNORMAL off the
bits S + 0x4B400000 are the float 12582912 + S, which costs one subtraction more and needs no B.
CONVERT leaves that to the machine's own conversion, one instruction of an unmeasured rate.

A tile is cut into two or four pieces, and the products of one piece run while the sums of the piece
before are scaled and the next codes are unpacked. Integers of two pieces and floats of all lie in
registers: half of what two sets for the tile would take.

Shape legend: M tokens, N outputs (NP with padding), K inputs, S groups of G inputs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels._prefill_orders import (
    along,
    down,
    make_barriers,
    make_more_stages,
    make_stages,
    meet,
    next_step,
    order_turn,
    tile_of,
)
from kernels.field_codes import centre_assembly

__all__ = ["prefill_groups_kernel"]


@gluon.jit
def prefill_groups_kernel(
    x_desc, w0_desc, w1_desc, w2_desc,
    x_scale_ptr, x_zero_ptr,
    rows_ptr, terms_ptr,
    bias_ptr,
    out_ptr, stride_om,
    M, N, NP, BLOCKS, GROUPS, BOUND,
    F0: gl.constexpr,
    F1: gl.constexpr,
    F2: gl.constexpr,
    TURN: gl.constexpr,
    SLICE: gl.constexpr,
    GROUP_SLICES: gl.constexpr,
    MULTIPLIER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SUBNORMAL: gl.constexpr,
    CONVERT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PART_M: gl.constexpr,
    STAGES: gl.constexpr,
    ROUND: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One program computes tiles ``[BLOCK_N, BLOCK_M]`` in pieces ``[BAND, PART_M]``, all of K.

    A round is what one turn of the loop takes: turns of whole groups, or one group of a turn.
    """
    NARROWEST: gl.constexpr = 8 // TURN
    R0: gl.constexpr = F0 // NARROWEST
    R1: gl.constexpr = F1 // NARROWEST
    R2: gl.constexpr = F2 // NARROWEST
    BYTES: gl.constexpr = ((R0 + R1 + R2) * BLOCK_N + TURN * BLOCK_M) * SLICE
    BAND: gl.constexpr = 16 * num_warps
    BANDS: gl.constexpr = BLOCK_N // BAND
    PARTS: gl.constexpr = BLOCK_M // PART_M
    TURNS: gl.constexpr = max(1, ROUND // TURN)
    # rounds that share a turn, and groups of a round
    CUTS: gl.constexpr = TURN // GROUP_SLICES if ROUND == GROUP_SLICES else 1
    TAKEN: gl.constexpr = TURN // GROUP_SLICES // CUTS
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, PART_M, 32]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=4)

    x_stages, x_tiles = make_stages(x_desc, STAGES, TURN * PARTS, PART_M, SLICE)
    w0_stages, w0_tiles = make_stages(w0_desc, STAGES, R0 * BANDS, BAND, SLICE)
    w1_stages, w1_tiles = make_more_stages(
        w1_desc, w0_stages, w0_tiles, STAGES, R1 * BANDS, BAND, SLICE
    )
    w2_stages, w2_tiles = make_more_stages(
        w2_desc, w0_stages, w0_tiles, STAGES, R2 * BANDS, BAND, SLICE
    )
    ready = make_barriers(STAGES)

    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(NP, BLOCK_N)
    steps = BLOCKS * NARROWEST
    # orders run ahead: their step in their tile, the tile and its place
    order_step, order_tile, order_n, order_m = _order_ahead(
        x_desc, w0_desc, w1_desc, w2_desc, x_stages, w0_stages, w1_stages, w2_stages,
        ready, tiles, steps, M, NP,
        F0, F1, F2, TURN, BYTES, BLOCK_M, BLOCK_N, STAGES, GROUP_M,
    )  # fmt: skip
    # the stage of a turn, whether it was filled an even number of times, the stage before
    stage, phase, before = 0, 0, STAGES - 1
    # the first slice of the round in its turn
    first = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_n, tile_m = tile_of(tile, M, NP, BLOCK_M, BLOCK_N, GROUP_M)
        first_n = tile_n * BLOCK_N
        totals = (gl.zeros((BAND, PART_M), gl.float32, MMA),) * (BANDS * PARTS)
        # the piece whose products run, and the one whose sums have been scaled
        running = gl.zeros((BAND, PART_M), gl.int32, MMA)
        spare = running
        scale = gl.zeros((BAND,), gl.float32, gl.SliceLayout(1, MMA))
        group = 0
        next_words = _read_rows(rows_ptr, 0, first_n, GROUPS, NP, BAND, MMA)
        words = next_words
        for _round in range(steps * CUTS // TURNS):
            for _turn in gl.static_range(TURNS):
                _wait_for_turn(ready.index(stage), phase, first, CUTS)
                codes = ()
                for piece in gl.static_range(TAKEN * BANDS * PARTS):
                    if piece % PARTS == 0:
                        # then come the rows of the next band, or of the first in the next group
                        words = next_words
                        next_words = _read_rows(
                            rows_ptr, group + (piece // PARTS % BANDS + 1) // BANDS,
                            first_n + (piece // PARTS + 1) % BANDS * BAND,
                            GROUPS, NP, BAND, MMA,
                        )  # fmt: skip
                        codes = _unpack_group(
                            w0_tiles, w1_tiles, w2_tiles, words, stage, first,
                            piece // (BANDS * PARTS) * GROUP_SLICES, piece // PARTS % BANDS, BANDS,
                            F0, F1, F2, TURN, GROUP_SLICES, CUTS, MULTIPLIER, LEFT,
                        )  # fmt: skip
                    spare = _multiply_group(
                        codes, x_tiles, spare,
                        stage * TURN + first + piece // (BANDS * PARTS) * GROUP_SLICES,
                        piece % PARTS, PARTS, GROUP_SLICES,
                    )  # fmt: skip
                    running, spare = warpgroup_mma_wait(GROUP_SLICES, deps=(running, spare))
                    if piece == 0 and (CUTS == 1 or first == 0):
                        # every warp has ended the products of the turn before
                        meet()
                        order_turn(
                            x_desc, w0_desc, w1_desc, w2_desc,
                            x_stages, w0_stages, w1_stages, w2_stages,
                            ready, before, order_tile < tiles, order_n, order_m, order_step,
                            NP, F0, F1, F2, TURN, 1, BYTES,
                        )  # fmt: skip
                        order_step, order_tile, order_n, order_m = next_step(
                            order_step, order_tile, order_n, order_m, steps, M, NP,
                            BLOCK_M, BLOCK_N, GROUP_M,
                        )  # fmt: skip
                    # the piece before, of the group before where this is the first
                    totals = _promote(
                        totals, (piece - 1) % (BANDS * PARTS), running, scale,
                        group - (piece % (BANDS * PARTS) == 0), BOUND, SUBNORMAL, CONVERT,
                    )  # fmt: skip
                    scale = _scale_of(words, SUBNORMAL)
                    group += (piece + 1) % (BANDS * PARTS) == 0
                    running, spare = spare, running
                first, stage, phase, before = _next_place(
                    first, stage, phase, before, TURN, GROUP_SLICES, CUTS, STAGES
                )
            # the compiler follows no product into the next turn of a loop: it would wait for each
            running = warpgroup_mma_wait(0, deps=(running,))
        totals = _promote(
            totals, BANDS * PARTS - 1, running, scale, group - 1, BOUND, SUBNORMAL, CONVERT
        )
        for piece in gl.static_range(BANDS * PARTS):
            _finish_piece(
                totals[piece], first_n + piece // PARTS * BAND,
                tile_m * BLOCK_M + piece % PARTS * PART_M,
                x_scale_ptr, x_zero_ptr, terms_ptr, bias_ptr, out_ptr, stride_om, M, N, NP, BOUND,
                MULTIPLIER, HAS_BIAS, SUBNORMAL, BAND, PART_M, MMA, num_warps,
            )  # fmt: skip


@gluon.jit
def _order_ahead(
    x_desc, w0_desc, w1_desc, w2_desc, x_stages, w0_stages, w1_stages, w2_stages,
    ready, tiles, steps, M, NP,
    F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, TURN: gl.constexpr, BYTES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Fill all stages but one; returns what is to be ordered next."""
    step, tile = 0, gl.program_id(0)
    tile_n, tile_m = tile_of(tile, M, NP, BLOCK_M, BLOCK_N, GROUP_M)
    for i in gl.static_range(STAGES - 1):
        order_turn(
            x_desc, w0_desc, w1_desc, w2_desc, x_stages, w0_stages, w1_stages, w2_stages,
            ready, i, tile < tiles, tile_n, tile_m, step, NP, F0, F1, F2, TURN, 1, BYTES,
        )  # fmt: skip
        step, tile, tile_n, tile_m = next_step(
            step, tile, tile_n, tile_m, steps, M, NP, BLOCK_M, BLOCK_N, GROUP_M
        )
    return step, tile, tile_n, tile_m


@gluon.jit
def _wait_for_turn(bar, phase, first, CUTS: gl.constexpr):
    if CUTS == 1 or first == 0:
        mbarrier.wait(bar, phase)


@gluon.jit
def _next_place(
    first, stage, phase, before,
    TURN: gl.constexpr, GROUP_SLICES: gl.constexpr, CUTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The next group of the turn, or the stage of the next turn."""
    if CUTS > 1:
        first += GROUP_SLICES
    if CUTS == 1 or first == TURN:
        first = 0
        before = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    return first, stage, phase, before


@gluon.jit
def _read_rows(rows_ptr, group, first_n, GROUPS, NP, BAND: gl.constexpr, MMA: gl.constexpr):
    """Words of a group for a band of rows: int32 ``[BAND]``, zero beyond the edge."""
    offs_n = first_n + gl.arange(0, BAND, gl.SliceLayout(1, MMA))
    mask = (offs_n < NP) & (group < GROUPS)
    return gl.load(rows_ptr + group * NP + offs_n, mask=mask, other=0)


@gluon.jit
def _unpack_group(
    w0_tiles, w1_tiles, w2_tiles, words, stage, first,
    FIRST: gl.constexpr, BAND_AT: gl.constexpr, BANDS: gl.constexpr,
    F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr,
    TURN: gl.constexpr, GROUP_SLICES: gl.constexpr, CUTS: gl.constexpr,
    MULTIPLIER: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Codes less zero-points, int8 ``[BAND, SLICE]`` for each slice of a group.

    The group begins FIRST slices behind `first`, of which only one is not 0.
    """
    centre = ((words >> 16) & 0xFF) * 0x01010101
    centre = gl.convert_layout(centre, gl.SliceLayout(1, LEFT))[:, None]
    codes = ()
    w0, w1, w2 = 0, 0, 0
    for s in gl.static_range(GROUP_SLICES):
        w0 = _hold_run(
            w0, w0_tiles, stage, first, FIRST + s, F0, TURN, BAND_AT, BANDS, s,
            GROUP_SLICES, CUTS, LEFT,
        )  # fmt: skip
        w1 = _hold_run(
            w1, w1_tiles, stage, first, FIRST + s, F1, TURN, BAND_AT, BANDS, s,
            GROUP_SLICES, CUTS, LEFT,
        )  # fmt: skip
        w2 = _hold_run(
            w2, w2_tiles, stage, first, FIRST + s, F2, TURN, BAND_AT, BANDS, s,
            GROUP_SLICES, CUTS, LEFT,
        )  # fmt: skip
        code = _centre_codes(w0, w1, w2, centre, FIRST + s, F0, F1, F2, MULTIPLIER)
        codes += (code,)  # type: ignore[assignment]
    return codes


@gluon.jit
def _hold_run(
    held, tiles, stage, first,
    S: gl.constexpr, FIELD: gl.constexpr, TURN: gl.constexpr,
    BAND_AT: gl.constexpr, BANDS: gl.constexpr, NTH: gl.constexpr,
    GROUP_SLICES: gl.constexpr, CUTS: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Bytes of a band that hold a field of slice S, the NTH of its group."""
    run = held
    if FIELD > 0 and (NTH == 0 or S * FIELD % 8 == 0):
        RUNS: gl.constexpr = FIELD * TURN // 8
        at = S * FIELD // 8 + first * FIELD // 8
        run = tiles.index((stage * RUNS + at) * BANDS + BAND_AT).load(LEFT)
        if CUTS > 1 and GROUP_SLICES * FIELD < 8:
            # what slips in from the next byte is masked away with its other fields
            run = gl.inline_asm_elementwise(
                "shr.b32 $0, $1, $2;", "=r,r,r,r,r,r", [run, first * FIELD % 8],
                dtype=gl.uint8, is_pure=True, pack=4,
            )  # fmt: skip
    return run


@gluon.jit
def _centre_codes(
    w0, w1, w2, centre,
    S: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr,
    MULTIPLIER: gl.constexpr,
):  # fmt: skip
    """Codes of slice S less their zero-points."""
    ASSEMBLY: gl.constexpr = centre_assembly(F0, F1, F2, S, MULTIPLIER)
    return gl.inline_asm_elementwise(
        ASSEMBLY,
        # four elements of the rows' words are four registers, all of them alike
        "=r,r,r,r,r,r,r,r",
        [w0, w1 if F1 > 0 else w0, w2 if F2 > 0 else w0, centre],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _multiply_group(
    codes, x_tiles, acc, first,
    PART: gl.constexpr, PARTS: gl.constexpr, GROUP_SLICES: gl.constexpr,
):  # fmt: skip
    """Start the products of a piece over the slices of a group; what acc held does not count."""
    for s in gl.static_range(GROUP_SLICES):
        x = x_tiles.index((first + s) * PARTS + PART).permute((1, 0))
        acc = warpgroup_mma(codes[s], x, acc, use_acc=s > 0, is_async=True)
    return acc


@gluon.jit
def _scale_of(words, SUBNORMAL: gl.constexpr):
    scale = (words & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return scale * 2.0**100 if SUBNORMAL else scale


@gluon.jit
def _promote(
    totals, PIECE: gl.constexpr, acc, scale, group, BOUND,
    SUBNORMAL: gl.constexpr, CONVERT: gl.constexpr,
):  # fmt: skip
    """Add the scaled sums of a piece to its total."""
    if SUBNORMAL:
        odd = group & 1
        values = (acc * (1 - 2 * odd) + (BOUND - (odd << 31))).to(gl.float32, bitcast=True)
    elif CONVERT:
        values = acc.to(gl.float32)
    else:
        values = (acc + 0x4B400000).to(gl.float32, bitcast=True) - 12582912.0
    total = gl.fma(values, scale[:, None], totals[PIECE])
    # the compiler has no other way
    return totals[:PIECE] + (total,) + totals[PIECE + 1 :]  # noqa: RUF005


@gluon.jit
def _finish_piece(
    total, first_n, first_m,
    x_scale_ptr, x_zero_ptr, terms_ptr, bias_ptr, out_ptr, stride_om, M, N, NP, BOUND,
    MULTIPLIER: gl.constexpr, HAS_BIAS: gl.constexpr, SUBNORMAL: gl.constexpr,
    BAND: gl.constexpr, PART_M: gl.constexpr, MMA: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Take back what the bound has added, correct the tokens' zero-points, scale, store."""
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [BAND // 8, 256 // BAND], [1, num_warps], [0, 1])
    offs_m = first_m + gl.arange(0, PART_M, ROW)
    offs_n = first_n + gl.arange(0, BAND, ROW)
    mask_m, mask_n = offs_m < M, offs_n < NP
    x_zero = gl.load(x_zero_ptr + offs_m, mask=mask_m, other=0).to(gl.float32)
    x_scale = gl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
    w_sum = gl.load(terms_ptr + offs_n, mask=mask_n, other=0.0)
    y = total
    if SUBNORMAL:
        added = gl.load(terms_ptr + (NP + offs_n), mask=mask_n, other=0.0)
        y = y * 2.0**49 - down(added * (BOUND * 1.0), MMA)
    # stored scales are those of whole steps
    y = y * (1.0 / MULTIPLIER) - down(w_sum, MMA) * along(x_zero, MMA)
    y = y * along(x_scale, MMA)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        y += down(bias, MMA)
    y = gl.convert_layout(y.to(out_ptr.dtype.element_ty), OUT)
    rows_n = first_n + gl.arange(0, BAND, gl.SliceLayout(1, OUT))
    rows_m = first_m + gl.arange(0, PART_M, gl.SliceLayout(0, OUT))
    out_ptrs = out_ptr + rows_n[:, None] + (rows_m.to(gl.int64) * stride_om)[None, :]
    gl.store(out_ptrs, y, mask=(rows_n < N)[:, None] & (rows_m < M)[None, :])
