"""The parts of a tile whose K several programs share, summed by the last to arrive.

Every program leaves its part in a slot of its own, so the order of the sum is that of the slots and
the result does not depend on who is last. Arrivals count up from zero and are zero again after.
"""

import triton
import triton.language as tl

__all__ = ["share_of_turns", "sum_splits"]


@triton.jit
def share_of_turns(split, turns, UNIT: tl.constexpr, SPLITS: tl.constexpr):
    """First turn of a split and the one after its last; UNIT turns stay together."""
    share = (turns + UNIT * SPLITS - 1) // (UNIT * SPLITS) * UNIT
    return tl.minimum(split * share, turns), tl.minimum((split + 1) * share, turns)


@triton.jit
def sum_splits(
    part, partial_ptr, arrivals_ptr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Return the sum of all parts of this tile and whether this program is to use it."""
    whole = part
    mine = True
    if SPLITS > 1:
        tile = tl.program_id(0)
        slot = (tile * SPLITS).to(tl.int64) * (BLOCK_N * BLOCK_M) + partial_ptr
        offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(slot + tl.program_id(1) * (BLOCK_N * BLOCK_M) + offs, part)
        # the barrier puts the stores of all threads before the release of the one that counts
        tl.debug_barrier()
        mine = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if mine:
            whole = tl.load(slot + offs, cache_modifier=".cg")
            for split in tl.range(1, SPLITS):
                whole += tl.load(slot + split * (BLOCK_N * BLOCK_M) + offs, cache_modifier=".cg")
            tl.store(arrivals_ptr + tile, 0)
    return whole, mine
