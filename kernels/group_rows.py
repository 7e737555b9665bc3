"""What the pipelined product reads of a weight whose columns have scales in groups.

    v_w[n,k]  =  c u_w[n,k] - z_w[n,g]                             a signed byte for every code
    rows[g,n] =  bits of s_w[n,g] as float16  +  2^16 (128 - z_w[n,g])
    terms[0]  =  sum_g s_w[n,g] sum_{k in g} v_w[n,k]
    terms[1]  =  sum_g (-1)^g s_w[n,g]
    B         =  the power of two from 128 G max |v_w| on: no sum of a group passes it

Groups lie outermost, so that the rows of a tile are one contiguous piece. Scales of half-step grids
are stored whole, as float16 has them; `terms[1]` too is in whole steps.

Shape legend: N rows, NP rows padded to a stored tile, S groups of G columns.
"""

from dataclasses import dataclass

import torch

__all__ = ["GroupRows", "pack_group_rows", "zero_terms"]

BYTE_BITS = 8
LARGEST_BYTE = 127
TOKEN_BITS = 7
TOKEN_REACH = 1 << TOKEN_BITS
LARGEST_BOUND = 1 << 22
"""Twice as much still are the bits of a float32 that is exact."""
GROUP_SIZES = (64, 128, 256)
"""Smaller groups spend more on scaling sums than on products."""
SCALE_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRows:
    """Scales and zero-points, one word for a row and a group."""

    rows: torch.Tensor
    """int32 ``[S, NP]``."""
    terms: torch.Tensor
    """float32 ``[2, NP]``."""
    bound: int
    """B."""

    def bound_for(self, token_bits: int) -> int:
        """B of tokens whose codes are narrower than a byte, and so reach less far."""
        return self.bound >> max(0, TOKEN_BITS - token_bits)


def pack_group_rows(
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    sums: torch.Tensor,
    *,
    rows: int,
    bits: int,
    multiplier: int,
    group_size: int,
) -> GroupRows | None:
    """Pack the rows of a weight, or tell that the pipelined product cannot serve it.

    Args:
        scale: float16 ``[NP, S]``, of whole steps.
        zero_point: int32 ``[NP, S]``.
        sums: int32 ``[NP, S]``, codes summed over a group.
        rows: N, those that are more than padding.
        bits: of a code.
        multiplier: c.
        group_size: G.

    Returns:
        None where codes less their zero-points are no signed bytes, scales are not float16 or
        groups have another size.
    """
    if group_size not in GROUP_SIZES or bits == BYTE_BITS or scale.dtype != torch.float16:
        return None
    least, most = (int(end) for end in torch.aminmax(zero_point[:rows]))
    highest = multiplier * ((1 << bits) - 1) - least
    if most > TOKEN_REACH or highest > LARGEST_BYTE:
        return None
    bound = 1 << (group_size * TOKEN_REACH * max(most, highest, 1) - 1).bit_length()
    if bound > LARGEST_BOUND:
        return None
    signs_S = 1.0 - 2.0 * (torch.arange(scale.shape[1], device=scale.device) % 2)
    of_zero_N = zero_terms(
        scale, zero_point, sums, multiplier=multiplier, group_size=group_size
    )  # fmt: skip
    terms = (of_zero_N, (scale.double() * signs_S).sum(1).float())
    words_NS = (scale.view(torch.int16).int() & 0xFFFF) | ((TOKEN_REACH - zero_point) << SCALE_BITS)
    return GroupRows(rows=words_NS.t().contiguous(), terms=torch.stack(terms), bound=bound)


def zero_terms(
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    sums: torch.Tensor,
    *,
    multiplier: int,
    group_size: int,
) -> torch.Tensor:
    """What a step of a token's zero-point takes from each output: float32 ``[NP]``, `terms[0]`."""
    whole_NS = multiplier * sums.double() - group_size * zero_point
    return ((scale.double() * whole_NS).sum(1) / multiplier).float()
