"""Second-order rounding: the error of a rounded column is passed on to the columns after it.

    minimize || W X_full - W^ X ||^2      X: inputs of the quantized chain, X_full: of the other

With H = X X^T and D = (X_full - X) X^T the best unrounded weight is W* = W (I + D H^-1), and

    || W X_full - W^ X ||^2 = || (W* - W^) H^(1/2) ||^2 + what no W^ can change

so aiming at W* and then rounding by GPTQ (Frantar et al. 2023) treats both (the aim of GPTAQ, Li et
al. 2025, in closed form; `TRUST` keeps D's sampling noise from being learned). GPTQ walks columns
in the order of falling H[k,k]; with U the upper Cholesky factor of H^-1,

    e = (w_k - rounded w_k) / U[k,k]         w_j -= e U[k,j]   for every later j

What is returned is each column as it was just before it was rounded: rounding it to nearest gives
GPTQ's codes, and learned rounding can start from there.

Shape legend: N outputs, K inputs, S groups in a row.
"""

from dataclasses import dataclass

import torch

from engine.numerics.affine import AffineParams
from engine.spec import WeightGrid
from kernels.column_rounding import WIDTH, round_columns

__all__ = ["InputMoments", "aim_at_full_precision", "pass_errors_on"]

DAMPING = 0.01
"""Part of the mean diagonal that is added to it (GPTQ's percdamp)."""
TRUST = 0.5
"""Part of the way from W to W* that is gone."""
MORE_DAMPING = 4
"""Times that damping is raised tenfold before columns are taken as independent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputMoments:
    """Second moments of a linear's inputs over all calibration tokens."""

    own: torch.Tensor
    """float32 ``[K, K]``: mean of ``x x^T`` of the quantized chain."""
    shift: torch.Tensor | None
    """float32 ``[K, K]``: mean of ``(x_full - x) x^T``; None where it was not asked for."""


def aim_at_full_precision(w_NK: torch.Tensor, moments: InputMoments) -> torch.Tensor:
    """Move a weight towards what answers the full-precision chain: float32 ``[N, K]``."""
    if moments.shift is None:
        return w_NK.float()
    factor_KK = _factor(_damped(moments.own))
    # D H^-1, as the transposed solution of H Z = D^T
    correction_KK = torch.cholesky_solve(moments.shift.t(), factor_KK).t()
    return w_NK.float() + TRUST * (w_NK.float() @ correction_KK)


def pass_errors_on(
    w_NK: torch.Tensor, params: AffineParams, grid: WeightGrid, moments: InputMoments
) -> torch.Tensor:
    """Change every column for the errors of the columns rounded before it.

    Args:
        w_NK: float ``[N, K]``.
        params: a grid that is placed; it stays.
        grid: of this layer.
        moments: of its inputs.

    Returns:
        float32 ``[N, K]``; its nearest codes are GPTQ's.
    """
    damped_KK = _damped(moments.own)
    order = torch.argsort(torch.diagonal(damped_KK), descending=True, stable=True)
    inverse_KK = torch.cholesky_inverse(_factor(damped_KK[order][:, order]))
    upper_KK = _factor(inverse_KK).t()
    rest_NK = w_NK.float()[:, order].contiguous()
    scale_NK, zero_NK = _by_column(params, w_NK.shape[1], order)
    half = 0.5 if grid.half_step else 0.0
    for start in range(0, w_NK.shape[1], WIDTH):
        stop = min(start + WIDTH, w_NK.shape[1])
        errors_NB = round_columns(
            rest_NK[:, start:stop],
            scale_NK[:, start:stop],
            zero_NK[:, start:stop],
            upper_KK[start:stop, start:stop],
            grid.max_code,
            half,
        )
        rest_NK[:, stop:] -= errors_NB @ upper_KK[start:stop, stop:]
    changed_NK = torch.empty_like(rest_NK)
    changed_NK[:, order] = rest_NK
    return changed_NK


def _damped(own_KK: torch.Tensor) -> torch.Tensor:
    """Make the moments safely invertible; an input that was always zero is alone with its damping.

    Its column then takes no error and gives none: it is rounded to nearest, which an expert that no
    token reached needs, and which costs nothing elsewhere.
    """
    damped_KK = own_KK.float().clone()
    diagonal_K = torch.diagonal(damped_KK)
    diagonal_K.add_((DAMPING * diagonal_K.mean()).clamp(min=1e-12))
    return damped_KK


def _factor(positive_KK: torch.Tensor) -> torch.Tensor:
    """Give the lower Cholesky factor, with more damping where float32 does not hold it."""
    for exponent in range(MORE_DAMPING):
        factored = torch.linalg.cholesky_ex(positive_KK)
        if not factored.info:
            factor_KK: torch.Tensor = factored.L
            return factor_KK
        positive_KK = positive_KK.clone()
        diagonal_K = torch.diagonal(positive_KK)
        diagonal_K.add_(DAMPING * 10**exponent * diagonal_K.mean())
    return torch.diag(torch.diagonal(positive_KK).clamp(min=1e-12).sqrt())


def _by_column(
    params: AffineParams, columns: int, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    group = columns // params.scale.shape[1]
    scale_NK = params.scale.float().repeat_interleave(group, dim=1)[:, order]
    zero_NK = params.zero_point.float().repeat_interleave(group, dim=1)[:, order]
    return scale_NK, zero_NK
