"""Products of quantized tokens and sliced weights in plain torch: what every GPU route must equal.

    I[m,n,g] = mult S - z_w (R - G z_x) - mult z_x C      S = sum_k u_x u_w over the group
    Y[m,n]   = s_x[m] (sum_g s_w[n,g] float(I[m,n,g])) + bias[n]

R are the token's code sums, C the weight's. I is an exact integer, converted once; groups are
summed in float32, first group first; the result is rounded once to the output type.

Shape legend: M tokens, N outputs, K inputs, L columns of the tokens, G inputs in a group, S groups.
"""

import torch

from kernels.sliced import SlicedWeight, unslice_codes
from kernels.tokens import BYTE_SHIFT, TokenCodes

__all__ = ["check_operands", "sliced_linear_reference"]

FLOAT32_EXACT = 1 << 24
BYTE_BITS = 8


def sliced_linear_reference(
    tokens: TokenCodes,
    weight: SlicedWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Multiply term by term on any device: ``[M, N]`` of ``out_dtype``.

    Args:
        tokens: M tokens of L >= K codes, with as many groups of sums as the weight.
        weight: N outputs of K codes.
        bias: float ``[N]`` or None.
        out_dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: if widths, groups or devices differ.
    """
    check_operands(tokens, weight, columns=weight.in_features)
    m, k, n = tokens.codes.shape[0], weight.in_features, weight.out_features
    size = weight.group_size
    shift = BYTE_SHIFT if weight.bits == BYTE_BITS else 0
    exact = (
        torch.float32 if size * BYTE_SHIFT * (1 << weight.bits) < FLOAT32_EXACT else torch.float64
    )
    x_MSG = tokens.codes[:, :k].reshape(m, weight.groups, size).to(exact)
    w_NSG = (unslice_codes(weight).to(exact) - shift).view(n, weight.groups, size)
    z_x, z_w = tokens.zero_point.long().unsqueeze(1), weight.zero_point[:n].long()
    out_MN = x_MSG.new_zeros((m, n), dtype=torch.float32)
    for g in range(weight.groups):
        dot_MN = (x_MSG[:, g] @ w_NSG[:, g].t()).long() - z_x * weight.sums[:n, g]
        centred_M1 = tokens.sums[:, g].long().unsqueeze(1) - size * z_x
        integer_MN = weight.multiplier * dot_MN - centred_M1 * z_w[:, g]
        out_MN += integer_MN.float() * weight.scale[:n, g].float()
    out_MN *= tokens.scale.unsqueeze(1)
    return (out_MN if bias is None else out_MN + bias.float()).to(out_dtype)


def check_operands(tokens: TokenCodes, weight: SlicedWeight, *, columns: int) -> None:
    """Hold tokens against a weight.

    Raises:
        ValueError: if the tokens have fewer than ``columns``, other groups or another device.
    """
    if tokens.codes.shape[1] < columns:
        raise ValueError(f"tokens have {tokens.codes.shape[1]} columns, the weight {columns}")
    if tokens.sums.shape[1] != weight.groups:
        raise ValueError(f"tokens have {tokens.sums.shape[1]} groups, the weight {weight.groups}")
    if tokens.codes.device != weight.scale.device:
        raise ValueError(f"tokens are on {tokens.codes.device}, weights on {weight.scale.device}")
