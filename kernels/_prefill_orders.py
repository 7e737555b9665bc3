"""What the Gluon kernels of many tokens share: buffers, orders of bytes, the walk over tiles.

Programs are persistent and order the bytes of a turn several turns ahead, on into the next tile:
an order fills one stage, and the barrier of the stage tells when its bytes have arrived.

Shape legend: M tokens, N outputs (NP with padding).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = [
    "along", "await_tokens", "down", "make_barriers", "make_more_stages", "make_stages", "meet",
    "next_step", "order_turn", "tile_of",
]  # fmt: skip

# names of Triton 3.6, and those that replaced them
_order_bytes = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
meet = getattr(gl, "barrier", None) or gl.thread_barrier
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def await_tokens(PDL: gl.constexpr):
    """Let the kernel that follows start, and wait for the one before and what it wrote."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0", "=r", [],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def make_stages(
    desc, STAGES: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr
):
    """Buffers as orders fill them, a box a stage, and as products read them, a tile each."""
    SHAPE: gl.constexpr = [STAGES] + desc.block_type.shape  # noqa: RUF005  no other way compiles
    stages = gl.allocate_shared_memory(desc.dtype, SHAPE, desc.layout)
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=WIDTH, element_bitwidth=8)
    if RENAMED:
        tiles = stages.reinterpret(desc.dtype, [STAGES * TILES, ROWS, WIDTH], TILE)
    else:
        # its name in Triton 3.6
        tiles = stages._reinterpret(desc.dtype, [STAGES * TILES, ROWS, WIDTH], TILE)  # noqa: SLF001
    return stages, tiles


@gluon.jit
def make_more_stages(
    desc, first_stages, first_tiles,
    STAGES: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Buffers of a further field; without one, those of the first stand in and are not used."""
    if TILES > 0:
        stages, tiles = make_stages(desc, STAGES, TILES, ROWS, WIDTH)
    else:
        stages, tiles = first_stages, first_tiles
    return stages, tiles


@gluon.jit
def make_barriers(STAGES: gl.constexpr):
    """One barrier a stage, which the bytes of its orders complete."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    return ready


@gluon.jit
def next_step(
    step, tile, tile_n, tile_m, steps, M, NP,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The step after this one, in this tile or in the next of this program."""
    step += 1
    if step == steps:
        step = 0
        tile += gl.num_programs(0)
        tile_n, tile_m = tile_of(tile, M, NP, BLOCK_M, BLOCK_N, GROUP_M)
    return step, tile, tile_n, tile_m


@gluon.jit
def order_turn(
    x_desc, w0_desc, w1_desc, w2_desc, x_stages, w0_stages, w1_stages, w2_stages,
    ready, stage, here, tile_n, tile_m, step, NP,
    F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr,
    TURN: gl.constexpr, CUTS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Order the bytes of one step of one tile, to be laid into a stage that nobody reads."""
    NARROWEST: gl.constexpr = 8 // TURN
    BOX_N: gl.constexpr = w0_desc.block_type.shape[1]
    STORED_N: gl.constexpr = w0_desc.block_type.shape[2]
    BLOCK_K: gl.constexpr = w0_desc.block_type.shape[3]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[1]
    bar = ready.index(stage)
    turn = step // CUTS
    cut = step % CUTS * BLOCK_K
    # tiles beyond the last row are those of the next block: read, never stored
    at = turn // NARROWEST * (NP // STORED_N) + tile_n * BOX_N
    part = turn % NARROWEST
    mbarrier.expect(bar, BYTES, pred=here)
    place = [part * (F0 // NARROWEST), at, 0, cut]
    _order_bytes(w0_desc, place, bar, w0_stages.index(stage), pred=here)
    if F1 > 0:
        place1 = [part * (F1 // NARROWEST), at, 0, cut]
        _order_bytes(w1_desc, place1, bar, w1_stages.index(stage), pred=here)
    if F2 > 0:
        place2 = [part * (F2 // NARROWEST), at, 0, cut]
        _order_bytes(w2_desc, place2, bar, w2_stages.index(stage), pred=here)
    place_x = [turn * TURN, tile_m * BLOCK_M, cut]
    _order_bytes(x_desc, place_x, bar, x_stages.index(stage), pred=here)


@gluon.jit
def down(v, MMA: gl.constexpr):
    return gl.convert_layout(v, gl.SliceLayout(1, MMA))[:, None]


@gluon.jit
def along(v, MMA: gl.constexpr):
    return gl.convert_layout(v, gl.SliceLayout(0, MMA))[None, :]


@gluon.jit
def tile_of(pid, M, NP, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """Walk GROUP_M tiles of tokens before the next tile of weights."""
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(NP, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    # beyond the last tile nothing is ordered; one keeps the division defined
    height = gl.maximum(gl.minimum(tiles_m - first_m, GROUP_M), 1)
    within = pid % (GROUP_M * tiles_n)
    return within // height, first_m + within % height
