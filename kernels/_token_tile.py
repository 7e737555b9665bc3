"""What follows the codes of a token whose tile is not in the order of memory.

    codes[K .. L) = 0          sums[g] = sum of codes[g SIZE .. (g + 1) SIZE),  SIZE = K / GROUPS

Both are for PARTS programs that share a token (`kernels._token_kernel` says how they meet).

Shape legend: K features, L columns of codes.
"""

import triton
import triton.language as tl

__all__ = ["store_group_sums", "store_padding"]


@triton.jit
def store_padding(codes_ptr, part, K: tl.constexpr, L: tl.constexpr, BLOCK_PAD: tl.constexpr):
    """Zeros behind a token's codes, by its part 0; BLOCK_PAD is at least ``L - K``."""
    # beyond L for all parts but the first
    pad = K + part * (L - K) + tl.arange(0, BLOCK_PAD)
    tl.store(codes_ptr + pad, tl.zeros((BLOCK_PAD,), dtype=tl.int8), mask=pad < L)


@triton.jit
def store_group_sums(
    sums_ptr, codes_ptr, first,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Sums of OWN groups from `first` on, all of them written by this program."""
    # groups are neighbours in memory, not in the tile: read back what this program wrote
    tl.debug_barrier()
    SIZE: tl.constexpr = K // GROUPS
    offs_g = tl.arange(0, BLOCK_G)
    groups = first + offs_g
    mask_g = (offs_g < OWN) & (groups < GROUPS)
    places = groups[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    codes = tl.load(codes_ptr + places, mask=mask_g[:, None], other=0)
    tl.store(sums_ptr + groups, tl.sum(codes.to(tl.int32), 1), mask=mask_g)
