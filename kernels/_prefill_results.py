"""What becomes of a tile of integer sums: corrected, scaled and written.

    y[n, m] = s_w[n] s_x[m] (c S - z_w (R - K z_x) - c z_x C)[n, m] + bias[n]

in the order of `kernels.tile_linear`. Results lie in registers as the tensor cores left them, four
neighbours in no direction that memory likes. Staged, they go through shared memory as a whole and
from there by one copy that runs while the next tile is multiplied; else in pieces that are read
back and written by the threads, which takes 16-bit results of any width and wider ones.

Shape legend: M tokens, N outputs (NP with padding), K inputs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels._prefill_orders import along, down, meet, tile_of

__all__ = ["load_terms", "make_staging", "scale_sums", "wait_for_copies", "write_tile"]

# its name in Triton 3.6, and the one that replaced it
_copy_to_memory = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def load_terms(
    tile, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, M, NP, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """What corrects and scales a tile, asked of memory before its products: they hide the wait."""
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    pid_n, pid_m = tile_of(tile, M, NP, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, ROW)
    offs_n = pid_n * BLOCK_N + gl.arange(0, BLOCK_N, ROW)
    mask_m, mask_n = offs_m < M, offs_n < NP
    x_zero = gl.load(x_zero_ptr + offs_m, mask=mask_m, other=0)
    x_rest = gl.load(x_sums_ptr + offs_m, mask=mask_m, other=0) - K * x_zero
    x_scale = gl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
    w_zero = gl.load(w_zero_ptr + offs_n, mask=mask_n, other=0)
    w_sum = gl.load(w_sums_ptr + offs_n, mask=mask_n, other=0)
    w_scale = gl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0).to(gl.float32)
    return x_zero, x_rest, x_scale, w_zero, w_sum, w_scale


@gluon.jit
def scale_sums(
    acc, tile, x_zero, x_rest, x_scale, w_zero, w_sum, w_scale,
    bias_ptr, M, N, NP, MULTIPLIER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    MMA: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Correct the sums in int32, convert once, scale: float32 ``[BLOCK_N, BLOCK_M]``."""
    # int32 may wrap on the way; the result fits
    whole = acc * MULTIPLIER - down(w_zero, MMA) * along(x_rest, MMA)
    whole -= down(w_sum, MMA) * along(x_zero * MULTIPLIER, MMA)
    y = whole.to(gl.float32) * down(w_scale, MMA) * along(x_scale, MMA)
    if HAS_BIAS:
        ROW: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
        first_n = tile_of(tile, M, NP, BLOCK_M, BLOCK_N, GROUP_M)[0] * BLOCK_N
        offs_n = first_n + gl.arange(0, BLOCK_N, ROW)
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        y += down(bias, MMA)
    return y


@gluon.jit
def make_staging(out_desc, other, STAGED: gl.constexpr):
    """Shared memory for a tile of results; where none is needed, something else stands in."""
    staging = other
    if STAGED:
        staging = gl.allocate_shared_memory(
            out_desc.dtype, out_desc.block_type.shape, out_desc.layout
        )
    return staging


@gluon.jit
def write_tile(
    y, tile, out_desc, staging, out_ptr, stride_om, M, N, NP,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    STAGED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Write a tile as a whole, or piece by piece, 16 bytes a thread."""
    pid_n, pid_m = tile_of(tile, M, NP, BLOCK_M, BLOCK_N, GROUP_M)
    if STAGED:
        # whoever started the copy of the tile before sees it leave, then all may write
        tma.store_wait(0)
        meet()
        staging.permute((1, 0)).store(y.to(out_desc.dtype))
        fence_async_shared()
        meet()
        # what lies beyond an edge is not written
        _copy_to_memory(out_desc, [pid_m * BLOCK_M, pid_n * BLOCK_N], staging)
    else:
        OUT: gl.constexpr = gl.BlockedLayout(
            [8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, num_warps], [0, 1]
        )
        y = gl.convert_layout(y.to(out_ptr.dtype.element_ty), OUT)
        rows_n = pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))
        rows_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        out_ptrs = out_ptr + rows_n[:, None] + (rows_m.to(gl.int64) * stride_om)[None, :]
        gl.store(out_ptrs, y, mask=(rows_n < N)[:, None] & (rows_m < M)[None, :])


@gluon.jit
def wait_for_copies(STAGED: gl.constexpr):
    if STAGED:
        tma.store_wait(0)
