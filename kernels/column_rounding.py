"""Rounding the columns of a weight one after the other, each for the errors of those before it.

    code_k = clamp(round(w_k / scale_k + half) + zero_k, 0, max_code)      rounding half to even
    e_k    = (w_k - (code_k - zero_k - half) scale_k) / U[k,k]
    w_j    = w_j - e_k U[k,j]                       for every later column j of the block

U is the upper Cholesky factor of the inverse of the inputs' second moments (GPTQ, Frantar et al.
2023). Rows are independent: a program keeps its rows in registers and walks the columns, where
plain torch takes some nine launches a column.

Layout: everything float32; the block is a view of the weight and is changed in place, so that each
column ends as it was just before it was rounded.

Shape legend: N rows, B columns of the block, at most `WIDTH`.
"""

import torch
import triton
import triton.language as tl

__all__ = ["WIDTH", "round_columns", "round_columns_reference"]

WIDTH = 128
"""Columns of a block at most: what a program holds of a row."""
ROWS = 16
"""Rows of a program; not tuned."""


def round_columns(
    block_NB: torch.Tensor,
    scale_NB: torch.Tensor,
    zero_NB: torch.Tensor,
    upper_BB: torch.Tensor,
    max_code: int,
    half: float = 0.0,
) -> torch.Tensor:
    """Walk the columns of a block: Triton on a GPU, plain torch on a CPU.

    Args:
        block_NB: float32 ``[N, B]``, columns next to each other; changed in place.
        scale_NB: float32 ``[N, B]``, positive.
        zero_NB: float32 ``[N, B]``, the zero-points, themselves codes.
        upper_BB: float32 ``[B, B]``, upper triangular with a positive diagonal.
        max_code: the largest code.
        half: 1/2 on a half-step grid, else 0.

    Returns:
        float32 ``[N, B]``: the errors e.

    Raises:
        ValueError: if the block has more than `WIDTH` columns or shapes differ.
    """
    _check_block(block_NB, scale_NB, zero_NB, upper_BB)
    if block_NB.device.type == "cpu":
        return round_columns_reference(block_NB, scale_NB, zero_NB, upper_BB, max_code, half)
    return launch_round_columns(block_NB, scale_NB, zero_NB, upper_BB, max_code, half)


def launch_round_columns(
    block_NB: torch.Tensor,
    scale_NB: torch.Tensor,
    zero_NB: torch.Tensor,
    upper_BB: torch.Tensor,
    max_code: int,
    half: float = 0.0,
) -> torch.Tensor:
    """Run the Triton kernel, on a GPU or in the interpreter; see `round_columns`."""
    n, width = block_NB.shape
    scale, zero = scale_NB.contiguous(), zero_NB.contiguous()
    upper = upper_BB.contiguous()
    errors = torch.empty_like(scale)
    _round_columns_kernel[(triton.cdiv(n, ROWS),)](
        block_NB, block_NB.stride(0),
        scale, zero, scale.stride(0),
        upper, upper.stride(0),
        errors, errors.stride(0),
        n, width, float(max_code), half,
        ROWS=ROWS,
        WIDTH=WIDTH,
        num_warps=4,
        # a fused product and sum would round otherwise than the reference does
        enable_fp_fusion=False,
    )  # fmt: skip
    return errors


def round_columns_reference(
    block_NB: torch.Tensor,
    scale_NB: torch.Tensor,
    zero_NB: torch.Tensor,
    upper_BB: torch.Tensor,
    max_code: int,
    half: float = 0.0,
) -> torch.Tensor:
    """The same in plain torch, column by column; see `round_columns`."""
    errors_NB = torch.empty_like(block_NB)
    for column in range(block_NB.shape[1]):
        w_N, scale_N, zero_N = block_NB[:, column], scale_NB[:, column], zero_NB[:, column]
        code_N = torch.round(w_N / scale_N + half).add_(zero_N).clamp_(0, max_code)
        error_N = (w_N - (code_N - zero_N - half) * scale_N) / upper_BB[column, column]
        errors_NB[:, column] = error_N
        block_NB[:, column + 1 :] -= torch.outer(error_N, upper_BB[column, column + 1 :])
    return errors_NB


@triton.jit
def _round_columns_kernel(
    block_ptr, stride_bn,
    scale_ptr, zero_ptr, stride_sn,
    upper_ptr, stride_uk,
    errors_ptr, stride_en,
    N, width, max_code, half,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One program walks the columns of ROWS rows: tile ``[ROWS, WIDTH]``."""
    offs_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, WIDTH)
    mask = (offs_n[:, None] < N) & (offs_k[None, :] < width)
    w_ptrs = block_ptr + offs_n[:, None] * stride_bn + offs_k[None, :]
    s_offs = offs_n[:, None] * stride_sn + offs_k[None, :]
    w = tl.load(w_ptrs, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + s_offs, mask=mask, other=1.0)
    zero = tl.load(zero_ptr + s_offs, mask=mask, other=0.0)
    errors = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for column in range(WIDTH):
        # columns beyond the block are zeros with a scale and a diagonal of one: they change nothing
        here = offs_k[None, :] == column
        w_n = tl.sum(tl.where(here, w, 0.0), axis=1)
        scale_n = tl.sum(tl.where(here, scale, 0.0), axis=1)
        zero_n = tl.sum(tl.where(here, zero, 0.0), axis=1)
        place = tl.zeros((WIDTH,), dtype=tl.int32) + column
        inside = (offs_k < width) & (place < width) & (offs_k >= place)
        row = tl.load(upper_ptr + place * stride_uk + offs_k, mask=inside, other=0.0)
        diagonal = tl.sum(tl.where(offs_k == place, row, 0.0), axis=0)
        diagonal = tl.where(diagonal == 0.0, 1.0, diagonal)
        later = tl.where(offs_k > place, row, 0.0)
        # half to even, as torch.round does, below 2^22; further out only the clamp is left
        steps = tl.clamp(tl.div_rn(w_n, scale_n) + half, -1024.0, 1024.0)
        code = ((steps + 12582912.0) - 12582912.0) + zero_n
        code = tl.minimum(tl.maximum(code, 0.0), max_code)
        error = tl.div_rn(w_n - (code - zero_n - half) * scale_n, diagonal + tl.zeros_like(w_n))
        errors = tl.where(here, error[:, None], errors)
        w = w - error[:, None] * later[None, :]
    tl.store(w_ptrs, w, mask=mask)
    tl.store(errors_ptr + offs_n[:, None] * stride_en + offs_k[None, :], errors, mask=mask)


def _check_block(
    block_NB: torch.Tensor,
    scale_NB: torch.Tensor,
    zero_NB: torch.Tensor,
    upper_BB: torch.Tensor,
) -> None:
    n, width = block_NB.shape
    if width > WIDTH or block_NB.stride(1) != 1:
        raise ValueError(f"a block has at most {WIDTH} adjacent columns, got {width}")
    if scale_NB.shape != (n, width) or zero_NB.shape != (n, width):
        raise ValueError(f"scale and zero must be [{n}, {width}], got {tuple(scale_NB.shape)}")
    if upper_BB.shape != (width, width):
        raise ValueError(f"upper must be [{width}, {width}], got {tuple(upper_BB.shape)}")
