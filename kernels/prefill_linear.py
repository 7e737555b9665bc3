"""Integer products of many tokens on Hopper, in Gluon: the formula of `kernels.tile_linear`.

A plain Triton loop waits for every product before it unpacks the codes of the next, and all warps
meet at a barrier each time. Here the next codes are unpacked while the tensor cores work:

    turn t   wait until its bytes have arrived
             slice 0: unpack, start the product, wait until the one before has ended
                      -> the buffers of turn t - 1 are free: order the bytes of turn t + STAGES - 1
             slice 1: unpack, start the product, ...

so one product is always under way, and what an order costs hides behind it. Programs are
persistent: orders run on into the next tile while the results of this one are stored.

Packed weights make tiles of many outputs cheap: for each column 256 outputs by 128 tokens read 128
bytes of tokens and 32 p of weights, a third less for each product than 128 by 128. The interpreter
cannot run Gluon; with a scale a row `kernels.tile_linear` gives the same bits. Scales in groups
have a kernel of their own, `kernels._prefill_groups_kernel`.

Shape legend: M tokens, N outputs (NP with padding), K inputs (L with padding).
"""

from functools import lru_cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels._prefill_groups_kernel import prefill_groups_kernel
from kernels._prefill_orders import (
    await_tokens,
    make_barriers,
    make_more_stages,
    make_stages,
    meet,
    next_step,
    order_turn,
    tile_of,
)
from kernels._prefill_results import (
    load_terms,
    make_staging,
    scale_sums,
    wait_for_copies,
    write_tile,
)
from kernels.field_codes import join_assembly
from kernels.prefill_config import (
    GroupShape,
    PrefillConfig,
    select_group_config,
    select_prefill_config,
)
from kernels.sliced import SlicedWeight
from kernels.tokens import TokenCodes

__all__ = ["prefill_linear"]

STAGED_BYTES = 2
"""Of a result: a tile of wider ones has no room in shared memory."""
STAGED_STEP = 8
"""Results a row is a multiple of: a copy starts at 16 bytes."""


def prefill_linear(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Multiply many quantized tokens by a sliced weight.

    Args:
        tokens: M tokens of L codes, rows contiguous.
        weight: N outputs of L codes; with groups only where it has `group_rows`.
        bias: float ``[N]`` or None.
        out_dtype: float16, bfloat16 or float32.
        config: how to launch; None takes the first of `prefill_configs` or `group_configs`.

    Returns:
        ``[M, N]`` of that dtype.

    Raises:
        ValueError: if the columns or groups differ, or groups or config are not for this kernel.
    """
    _check_operands(tokens, weight)
    m = tokens.codes.shape[0]
    out = tokens.codes.new_empty((m, weight.out_features), dtype=out_dtype)
    if not m:
        return out
    if weight.groups > 1:
        _launch_groups(tokens, weight, bias, out, config)
    else:
        _launch_rows(tokens, weight, bias, out, config)
    return out


def _launch_rows(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: PrefillConfig | None,
) -> None:
    m, n = out.shape
    config = config or select_prefill_config(weight.field_bits, weight.slice_bytes, m)
    if out.element_size() > STAGED_BYTES:
        config = config.fitted(weight.field_bits, weight.slice_bytes, wide=True)
    turn = 8 // weight.field_bits[-1]
    staged = config.staged and out.element_size() == STAGED_BYTES and n % STAGED_STEP == 0
    descriptors = _descriptors(tokens, weight, config, turn)
    _prefill_kernel[(_programs(config, m, weight),)](
        *descriptors,
        tokens.scale, tokens.zero_point, tokens.sums,
        weight.scale, weight.zero_point, weight.sums,
        bias if bias is not None else weight.scale,
        _result_descriptor(out, config) if staged else descriptors[0],
        out, out.stride(0),
        m, n, weight.padded_rows, weight.columns // (8 * weight.slice_bytes), weight.in_features,
        **_common_constants(weight, config),
        TURN=turn,
        STAGED=staged,
        PDL=config.pdl,
        HAS_BIAS=bias is not None,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip


def _launch_groups(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: PrefillConfig | None,
) -> None:
    rows, (m, n) = weight.group_rows, out.shape
    assert rows is not None, "operands are checked"
    group_slices = weight.group_size // weight.slice_bytes
    if config is None:
        shape = GroupShape(
            field_bits=weight.field_bits, slice_bytes=weight.slice_bytes,
            group_slices=group_slices, m=triton.next_power_of_2(m), n=weight.padded_rows,
        )  # fmt: skip
        config = select_group_config(shape)
    if out.element_size() > STAGED_BYTES:
        config = config.fitted(weight.field_bits, weight.slice_bytes, group_slices, wide=True)
    turn = config.turn_slices(weight.field_bits, group_slices)
    prefill_groups_kernel[(_programs(config, m, weight),)](
        *_descriptors(tokens, weight, config, turn),
        tokens.scale, tokens.zero_point,
        rows.rows, rows.terms,
        bias if bias is not None else weight.scale,
        out, out.stride(0),
        m, n, weight.padded_rows, weight.columns // (8 * weight.slice_bytes),
        weight.groups, rows.bound_for(tokens.bits),
        **_common_constants(weight, config),
        TURN=turn,
        GROUP_SLICES=group_slices,
        HAS_BIAS=bias is not None,
        SUBNORMAL=config.subnormal and not config.convert,
        CONVERT=config.convert,
        PART_M=config.part_m,
        ROUND=config.round_slices,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip


def _common_constants(weight: SlicedWeight, config: PrefillConfig) -> dict[str, int]:
    config.check_stages()
    return {
        **dict(zip(("F0", "F1", "F2"), (*weight.field_bits, 0, 0), strict=False)),
        "SLICE": weight.slice_bytes,
        "MULTIPLIER": weight.multiplier,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "GROUP_M": config.group_m,
    }


def _programs(config: PrefillConfig, m: int, weight: SlicedWeight) -> int:
    tiles = -(-m // config.block_m) * -(-weight.padded_rows // config.block_n)
    return min(tiles, config.programs)


def _descriptors(
    tokens: TokenCodes, weight: SlicedWeight, config: PrefillConfig, turn: int
) -> list[TensorDescriptor]:
    """Tokens and three fields; the first stands in for those that a code has not."""
    fields = [_field_descriptor(weight, i, config, turn) for i in range(len(weight.fields))]
    fields += [fields[0]] * (3 - len(fields))
    return [_token_descriptor(tokens.codes, weight, config, turn), *fields]


def _token_descriptor(
    codes: torch.Tensor, weight: SlicedWeight, config: PrefillConfig, turn: int
) -> TensorDescriptor:
    """View tokens as ``[L / SLICE, M, SLICE]``: one box holds the slices of a turn."""
    m, columns = codes.shape
    width = weight.slice_bytes
    box = [turn, config.block_m, config.block_k]
    shape, strides = [columns // width, m, width], [width, codes.stride(0), 1]
    return TensorDescriptor(codes, shape, strides, box, _box_layout(config, 3))


def _field_descriptor(
    weight: SlicedWeight, i: int, config: PrefillConfig, turn: int
) -> TensorDescriptor:
    """View a field as ``[f, tiles, BN, SLICE]``: one box holds the runs of a turn."""
    field, bits = weight.fields[i], weight.field_bits[i]
    blocks, tiles, _, stored_n, width = field.shape
    # a byte of 8 bits is a finished code
    field = field.view(torch.int8) if bits == 8 else field
    box = [bits * turn // 8, config.block_n // stored_n, stored_n, config.block_k]
    shape = [bits, blocks * tiles, stored_n, width]
    strides = [stored_n * width, bits * stored_n * width, width, 1]
    return TensorDescriptor(field, shape, strides, box, _box_layout(config, 4))


def _result_descriptor(out: torch.Tensor, config: PrefillConfig) -> TensorDescriptor:
    """View results as ``[M, N]``: one box is a tile."""
    box = [config.block_m, config.block_n]
    shape, strides = list(out.shape), [out.stride(0), 1]
    return TensorDescriptor(out, shape, strides, box, _layout_of(128, 2, 8 * STAGED_BYTES))


def _box_layout(config: PrefillConfig, rank: int) -> gl.NVMMASharedLayout:
    return _layout_of(config.block_k, rank)


@lru_cache(maxsize=16)
def _layout_of(width: int, rank: int, bits: int = 8) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


def _check_operands(tokens: TokenCodes, weight: SlicedWeight) -> None:
    columns, groups = tokens.codes.shape[1], tokens.sums.shape[1]
    if columns != weight.columns or groups != weight.groups:
        raise ValueError(
            f"tokens of {columns} columns in {groups} groups do not fit a weight of"
            f" {weight.columns} in {weight.groups}"
        )
    if groups > 1 and weight.group_rows is None:
        raise ValueError(
            f"{groups} groups of {weight.group_size} columns and {weight.bits} bits are not for"
            " this kernel"
        )


@gluon.jit
def _prefill_kernel(
    x_desc, w0_desc, w1_desc, w2_desc,
    x_scale_ptr, x_zero_ptr, x_sums_ptr,
    w_scale_ptr, w_zero_ptr, w_sums_ptr,
    bias_ptr,
    out_desc, out_ptr, stride_om,
    M, N, NP, BLOCKS, K,
    F0: gl.constexpr,
    F1: gl.constexpr,
    F2: gl.constexpr,
    TURN: gl.constexpr,
    SLICE: gl.constexpr,
    MULTIPLIER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGED: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One program computes tiles ``[BLOCK_N, BLOCK_M]``, weights on the left, all of K."""
    NARROWEST: gl.constexpr = 8 // TURN
    CUTS: gl.constexpr = SLICE // BLOCK_K
    R0: gl.constexpr = F0 // NARROWEST
    R1: gl.constexpr = F1 // NARROWEST
    R2: gl.constexpr = F2 // NARROWEST
    BYTES: gl.constexpr = ((R0 + R1 + R2) * BLOCK_N + TURN * BLOCK_M) * BLOCK_K
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, min(BLOCK_M, 128), 32]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=4)

    x_stages, x_tiles = make_stages(x_desc, STAGES, TURN, BLOCK_M, BLOCK_K)
    w0_stages, w0_tiles = make_stages(w0_desc, STAGES, R0, BLOCK_N, BLOCK_K)
    w1_stages, w1_tiles = make_more_stages(
        w1_desc, w0_stages, w0_tiles, STAGES, R1, BLOCK_N, BLOCK_K
    )
    w2_stages, w2_tiles = make_more_stages(
        w2_desc, w0_stages, w0_tiles, STAGES, R2, BLOCK_N, BLOCK_K
    )
    ready = make_barriers(STAGES)
    staging = make_staging(out_desc, x_stages, STAGED)
    await_tokens(PDL)

    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(NP, BLOCK_N)
    steps = BLOCKS * NARROWEST * CUTS
    # orders run ahead: their number, their step in their tile, the tile and its place
    order, order_step, order_tile = 0, 0, gl.program_id(0)
    order_n, order_m = tile_of(order_tile, M, NP, BLOCK_M, BLOCK_N, GROUP_M)
    for _ in gl.static_range(STAGES - 1):
        order_turn(
            x_desc, w0_desc, w1_desc, w2_desc, x_stages, w0_stages, w1_stages, w2_stages,
            ready, order % STAGES, order_tile < tiles, order_n, order_m, order_step, NP,
            F0, F1, F2, TURN, CUTS, BYTES,
        )  # fmt: skip
        order += 1
        order_step, order_tile, order_n, order_m = next_step(
            order_step, order_tile, order_n, order_m, steps, M, NP, BLOCK_M, BLOCK_N, GROUP_M
        )
    n = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        x_zero, x_rest, x_scale, w_zero, w_sum, w_scale = load_terms(
            tile, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
            M, NP, K, BLOCK_M, BLOCK_N, GROUP_M, num_warps,
        )  # fmt: skip
        acc = gl.zeros((BLOCK_N, BLOCK_M), gl.int32, MMA)
        for _step in range(steps):
            stage = n % STAGES
            mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
            w0, w1, w2 = 0, 0, 0
            for s in gl.static_range(TURN):
                w0 = _hold_run(w0, w0_tiles, stage * R0, s, F0, LEFT)
                w1 = _hold_run(w1, w1_tiles, stage * R1, s, F1, LEFT)
                w2 = _hold_run(w2, w2_tiles, stage * R2, s, F2, LEFT)
                codes = _join_fields(w0, w1, w2, s, F0, F1, F2)
                x = x_tiles.index(stage * TURN + s).permute((1, 0))
                acc = warpgroup_mma(codes, x, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if s == 0:
                    # every warp has ended the products of the turn before
                    meet()
                    order_turn(
                        x_desc, w0_desc, w1_desc, w2_desc,
                        x_stages, w0_stages, w1_stages, w2_stages,
                        ready, order % STAGES, order_tile < tiles, order_n, order_m, order_step, NP,
                        F0, F1, F2, TURN, CUTS, BYTES,
                    )  # fmt: skip
            n += 1
            order += 1
            order_step, order_tile, order_n, order_m = next_step(
                order_step, order_tile, order_n, order_m, steps, M, NP, BLOCK_M, BLOCK_N, GROUP_M
            )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        y = scale_sums(
            acc, tile, x_zero, x_rest, x_scale, w_zero, w_sum, w_scale, bias_ptr, M, N, NP,
            MULTIPLIER, HAS_BIAS, BLOCK_M, BLOCK_N, GROUP_M, MMA, num_warps,
        )  # fmt: skip
        write_tile(
            y, tile, out_desc, staging, out_ptr, stride_om, M, N, NP,
            BLOCK_M, BLOCK_N, GROUP_M, STAGED, num_warps,
        )  # fmt: skip
    # shared memory goes with the program
    wait_for_copies(STAGED)


@gluon.jit
def _hold_run(
    held, tiles, first, S: gl.constexpr, FIELD: gl.constexpr, LEFT: gl.constexpr
):  # fmt: skip
    """`hold_run` of `kernels.field_codes`, from shared memory; bytes of 8 bits stay there."""
    run = held
    if FIELD == 8:
        run = tiles.index(first + S)
    elif FIELD > 0 and S * FIELD % 8 == 0:
        run = tiles.index(first + S * FIELD // 8).load(LEFT)
    return run


@gluon.jit
def _join_fields(w0, w1, w2, S: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr):
    """`join_fields` of `kernels.field_codes` on tensors of Gluon."""
    if F0 == 8:
        codes = w0
    else:
        ASSEMBLY: gl.constexpr = join_assembly(F0, F1, F2, S)
        codes = gl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,r,r,r",
            [w0, w1 if F1 > 0 else w0, w2 if F2 > 0 else w0],
            dtype=gl.int8,
            is_pure=True,
            pack=4,
        )
    return codes
