"""What the memory of a device goes to while one model is served; no tensors.

pages = (fraction of the free memory - workspace - graphs) / bytes of a page, less a scratch page
"""

from dataclasses import dataclass

from engine.architecture import Architecture
from engine.errors import EngineError
from engine.spec import FULL_BITS

__all__ = [
    "MemoryPlan",
    "OutOfMemory",
    "chunk_buckets",
    "count_pages",
    "decode_buckets",
    "token_bytes",
    "useful_tokens",
]

DENSE_BUCKETS = (1, 2, 4, 8, 16, 24, 32)
FINE_STEP, FINE_END = 16, 128
COARSE_STEP = 32
LEAST_CHUNK = 64
CHUNK_STEPS = 4
"""Between a number of tokens and its double: a step computes a fifth for nothing at most, from 256
tokens on."""
LEAST_TOKENS = 256
"""A cache for fewer serves nobody."""
CODE_FIELDS = (2, 4, 8)
"""Bits that a code of a key or value may take in memory."""
PLACE_BYTES = 4 + 1
"""Scale and zero-point of the key or the value of a head."""


class OutOfMemory(EngineError):
    """The device has no memory left for keys and values."""

    code = "out_of_memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by what they are for."""

    weight_bytes: int
    workspace_bytes: int
    """What a step of the most tokens takes beside weights and pages."""
    graph_bytes: int
    """What captured steps hold; before they are captured, what they may."""
    page_bytes: int
    """One page of all layers."""
    pages: int
    """Without the scratch page."""
    sampler_bytes: int = 0
    """What draws keep by slot; taken before the rest is planned."""

    @property
    def kv_bytes(self) -> int:
        """All pages, the scratch page included."""
        return self.page_bytes * (self.pages + 1)

    @property
    def total_bytes(self) -> int:
        """Everything."""
        held = self.weight_bytes + self.sampler_bytes
        return held + self.workspace_bytes + self.graph_bytes + self.kv_bytes


def token_bytes(architecture: Architecture, kv_bits: int, value_bytes: int = 2) -> int:
    """Bytes of one token's keys and values in all layers (`kernels.kv_pages`).

    Args:
        architecture: counts layers, heads and dims.
        kv_bits: 2..8, or 16 for values as they are.
        value_bytes: of such a value: 2 on a GPU, 4 on a CPU.
    """
    if kv_bits == FULL_BITS:
        head_bytes = value_bytes * architecture.head_dim
    else:
        field = next(each for each in CODE_FIELDS if each >= kv_bits)
        head_bytes = architecture.head_dim * field // 8 + PLACE_BYTES
    return 2 * architecture.layers * architecture.kv_heads * head_bytes


def useful_tokens(max_sequences: int, context_length: int) -> int:
    """What all sequences at their longest fill, and as much again for prefixes that come back."""
    return 2 * max_sequences * context_length


def count_pages(budget_bytes: int, page_bytes: int, page_size: int) -> int:
    """Say how many pages a budget is good for, besides the scratch page.

    Args:
        budget_bytes: for keys and values.
        page_bytes: of one page in all layers.
        page_size: tokens of a page.

    Raises:
        OutOfMemory: if it is not enough for 256 tokens.
    """
    pages = budget_bytes // page_bytes - 1
    if pages * page_size < LEAST_TOKENS:
        raise OutOfMemory(
            f"kv cache: {max(0, budget_bytes)} bytes hold {max(0, pages) * page_size} tokens, fewer"
            f" than {LEAST_TOKENS}; raise memory_fraction, lower kv_bits, or unload another model"
        )
    return pages


def decode_buckets(max_sequences: int) -> tuple[int, ...]:
    """List the batch sizes that decode steps are captured for, in rising order.

    Args:
        max_sequences: the last of them.
    """
    fine = range(DENSE_BUCKETS[-1] + FINE_STEP, FINE_END + 1, FINE_STEP)
    coarse = range(FINE_END + COARSE_STEP, max_sequences + 1, COARSE_STEP)
    below = {each for each in (*DENSE_BUCKETS, *fine, *coarse) if each < max_sequences}
    return (*sorted(below), max_sequences)


def chunk_buckets(max_step_tokens: int) -> tuple[int, ...]:
    """List the numbers of tokens that steps of chunks are captured for, in rising order.

    Every power of two from 64 on is among them: what `kernels.tables` chooses for a batch is what
    it chooses for the batch filled up.

    Args:
        max_step_tokens: the last of them.
    """
    buckets, tokens = [], LEAST_CHUNK
    while tokens < max_step_tokens:
        buckets.append(tokens)
        power = 1 << (tokens.bit_length() - 1)
        tokens += max(LEAST_CHUNK, power // CHUNK_STEPS)
    return (*buckets, max_step_tokens)
