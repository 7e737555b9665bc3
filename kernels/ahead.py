"""Weights of a later product, brought into the second level of the cache by one that waits.

Between two products of a layer small kernels run, one after another, and the memory is idle. The
product behind them is on the multiprocessors already (programmatic dependent launch), its own
weights are under way, and before it waits it asks for those of the product after it. Of each of P
programs eight threads ask for a piece:

    piece = ceil(bytes / 8 P), in whole lines        start = min((8 p + t) piece, bytes - piece)

Nothing is written and no register is held: an answer that is late costs nothing but its place.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["NOTHING", "Pieces", "ask_ahead", "ask_assembly", "pieces_of"]

THREADS = 8
LINE = 128
MOST_BYTES = 20 << 20
"""What memory gives in the 6 us between two products, and less than half of the cache."""


class Pieces(NamedTuple):
    """How a kernel's programs share what is asked for."""

    bytes: int
    """Of a piece; 0 asks for nothing."""
    last: int
    """Where the last one begins."""


NOTHING = Pieces(0, 0)


def pieces_of(memory: torch.Tensor | None, programs: int) -> Pieces:
    """Share contiguous memory out.

    Args:
        memory: what a later kernel reads; None for nothing.
        programs: of the kernel that asks.
    """
    total = 0 if memory is None else min(memory.nbytes, MOST_BYTES) // LINE * LINE
    if not total:
        return NOTHING
    piece = -(-total // (THREADS * programs * LINE)) * LINE
    return Pieces(piece, total - piece)


@triton.constexpr_function
def ask_assembly() -> str:
    """Write what a thread does. Registers: 1 address, 2 the program's start, 3 last, 4 bytes."""
    return (
        "{ .reg .pred mine; .reg .b32 at, lane; .reg .b64 from; "
        f"mov.u32 lane, %tid.x; setp.lt.u32 mine, lane, {THREADS}; "
        "mad.lo.u32 at, lane, $4, $2; min.u32 at, at, $3; "
        "cvt.u64.u32 from, at; add.u64 from, from, $1; "
        "@mine cp.async.bulk.prefetch.L2.global [from], $4; mov.u32 $0, 0; }"
    )


@triton.jit
def ask_ahead(ahead_ptr, piece, last, AHEAD: tl.constexpr):
    """Ask for the pieces of one program, if for anything."""
    if AHEAD:
        program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        ASSEMBLY: tl.constexpr = ask_assembly()
        tl.inline_asm_elementwise(
            ASSEMBLY, "=r,l,r,r,r",
            [ahead_ptr.to(tl.int64), program * (8 * piece), last, piece],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
