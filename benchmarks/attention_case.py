"""What decode attention is measured on, and the launches that are tried.

bytes = codes, scales and zero-points of every token of a batch

Launches are the same for all cases of one shape, whatever their batch and context: a launch is
chosen by the shape, as a sequence must give the same bits in every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernel_case import MEMORY_BYTES_PER_US
from kernels.attention_config import AttentionKey, LaunchConfig
from kernels.kv_pages import RAW_BITS, field_bits

__all__ = ["CASES", "PAGE_SIZE", "TOY", "AttentionCase"]

PAGE_SIZE = 16
SPREAD = 1 / 9
"""Of the contexts of a batch, to either side."""
PROGRAMS = 128
TILES = {
    RAW_BITS: ((64, 4, 3), (64, 4, 2), (32, 4, 3), (64, 8, 3)),
    8: ((128, 4, 2), (128, 4, 3), (64, 4, 3), (64, 2, 3)),
    4: ((128, 4, 3), (128, 4, 2), (64, 2, 3), (256, 4, 2)),
    2: ((32, 1, 3), (64, 2, 3), (64, 2, 2), (128, 4, 2)),
}
"""Tokens, warps and stages by bits of a field. Compiled for sm_90 with 128 dims, none of 4 bits and
more spills, and two programs at least are resident."""
CHUNKS = ((1.0, 1), (1.0, 2), (0.5, 2), (0.5, 3), (0.5, 4), (2.0, 1))
"""Splits for each program that fills the GPU with one sequence, and tiles of the least chunk."""
UNASKED = ((1.0, 1), (0.5, 3))
"""Of these, the first tile is also tried without asking ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """One layer of a model under one load."""

    name: str
    kv_heads: int
    group: int
    bits: int
    context: int
    """Stored tokens of a sequence, on average."""
    tokens: int
    """What the block table can hold: the context of the model."""
    batch: int = 1
    head_dim: int = 128

    @property
    def key(self) -> AttentionKey:
        """What a launch is chosen by."""
        return AttentionKey(
            kv_heads=self.kv_heads,
            group=self.group,
            head_dim=self.head_dim,
            bits=self.bits,
            tokens=self.tokens,
        )

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.name} x{self.batch} at {self.context}, KV{self.bits}"

    @property
    def lengths(self) -> list[int]:
        """Stored tokens of each sequence: spread evenly about the context."""
        if self.batch == 1:
            return [self.context]
        step = 2 * SPREAD * self.context / (self.batch - 1)
        return [round(self.context * (1 - SPREAD) + step * i) for i in range(self.batch)]

    @property
    def moved_bytes(self) -> int:
        """What a launch has to read."""
        raw = self.bits == RAW_BITS
        row = self.head_dim * (RAW_BITS if raw else field_bits(self.bits)) // 8
        # two rows, two scales and two zero-points
        return sum(self.lengths) * self.kv_heads * (2 * row + (0 if raw else 2 * 4 + 2))

    @property
    def roofline_us(self) -> float:
        """Memory alone."""
        return self.moved_bytes / MEMORY_BYTES_PER_US

    @property
    def configs(self) -> list[LaunchConfig]:
        """Launches to compare, none twice."""
        field = RAW_BITS if self.bits == RAW_BITS else field_bits(self.bits)
        fills = max(1, PROGRAMS // self.kv_heads)
        tried = [(chunk, tile, 2) for chunk in CHUNKS for tile in TILES[field]]
        tried += [(chunk, TILES[field][0], 0) for chunk in UNASKED]
        configs = [
            LaunchConfig(
                splits=max(2, min(int(share * fills), -(-self.tokens // (tiles * block_t)))),
                min_chunk=tiles * block_t,
                block_t=block_t,
                num_warps=num_warps,
                num_stages=num_stages,
                ahead=ahead,
            )
            for (share, tiles), (block_t, num_warps, num_stages), ahead in tried
        ]
        return list(dict.fromkeys(configs))


def _llama(bits: int, context: int, batch: int = 1) -> AttentionCase:
    return AttentionCase(
        name="llama-7b", kv_heads=32, group=1, bits=bits, context=context, tokens=4096, batch=batch
    )


def _llama3(bits: int, context: int, batch: int = 1) -> AttentionCase:
    return AttentionCase(
        name="llama-3-8b", kv_heads=8, group=4, bits=bits, context=context, tokens=8192, batch=batch
    )


CASES: Sequence[AttentionCase] = (
    _llama3(8, 1152, 64),
    _llama3(8, 4096),
    _llama3(8, 1152, 16),
    _llama(16, 256),
    _llama3(16, 256),
    _llama3(4, 1152, 64),
    _llama(4, 256),
)
"""Those of one shape next to each other, those with a goal first."""
TOY: Sequence[AttentionCase] = (
    AttentionCase(
        name="toy", kv_heads=1, group=2, bits=4, context=160, tokens=256, batch=2, head_dim=64
    ),
)
