"""One product to measure, what it must at least cost, and which products tell most.

    roofline = max(bytes / memory rate, operations / rate of the fastest unit that can do them)

Bytes are weights, scales, tokens and 16-bit outputs, each once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels.tables import TableKey

__all__ = ["GOALS", "HEADS", "LAYERS", "SERVED", "TOY", "KernelCase", "all_cases"]

# one H100 SXM: measured memory rate, datasheet and measured (b1) rates of the tensor cores
MEMORY_BYTES_PER_US = 3.0e6
INT8_OPS_PER_US = 1979e6
BF16_OPS_PER_US = 989e6
BINARY_OPS_PER_US = 10469e6
HALF_BITS = 16
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)

LAYERS: dict[str, Sequence[tuple[int, int]]] = {
    "llama-7b": ((22016, 4096), (4096, 4096), (12288, 4096), (4096, 11008)),
    "llama-3-8b": ((28672, 4096), (6144, 4096), (4096, 14336)),
    "llama-70b": ((8192, 8192), (57344, 8192), (10240, 8192), (8192, 28672)),
}
"""N and K of gate-up, output, qkv and down; the output of 8B is that of 7B."""

HEADS = ((128256, 4), (32000, 8), (128256, 8))
"""Vocabulary and stored bits of heads that are served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """M tokens of `a_bits` times N x K weights of `w_bits`."""

    n: int
    k: int
    m: int
    w_bits: int
    a_bits: int = 8
    group_size: int = -1
    cut: bool = False
    """Tokens are given as bits for the binary tensor core, which alone may answer then."""

    @property
    def groups(self) -> int:
        """Scales of one row."""
        return 1 if self.group_size == -1 else self.k // self.group_size

    @property
    def key(self) -> TableKey:
        """Where the table has it."""
        return TableKey.of(
            a_bits=self.a_bits, w_bits=self.w_bits, group=self.group_size,
            n=self.n, k=self.k, m=self.m,
        )  # fmt: skip

    @property
    def label(self) -> str:
        """For a person: ``W2A8 22016x4096 m1``."""
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        cut = " cut" if self.cut else ""
        return f"W{self.w_bits}A{self.a_bits}{group} {self.n}x{self.k} m{self.m}{cut}"

    @property
    def moved_bytes(self) -> int:
        """Each operand and the output once."""
        weights = self.n * self.k * self.w_bits // 8 + 2 * self.n * self.groups
        return weights + self.m * self.k * max(1, self.a_bits // 8) + 2 * self.m * self.n

    @property
    def operations(self) -> int:
        """A multiplication and an addition a weight and token."""
        return 2 * self.m * self.n * self.k

    @property
    def roofline_us(self) -> float:
        """The least time of an H100."""
        if self.a_bits == HALF_BITS:
            compute = self.operations / BF16_OPS_PER_US
        else:
            binary = self.operations * self.w_bits * self.a_bits / BINARY_OPS_PER_US
            compute = min(self.operations / INT8_OPS_PER_US, binary)
        return max(self.moved_bytes / MEMORY_BYTES_PER_US, compute)


def _goals() -> Iterator[KernelCase]:
    gate_up, small, large = (22016, 4096), (4096, 4096), (8192, 8192)
    for n, k in (gate_up, small, large):
        yield from (KernelCase(n=n, k=k, m=1, w_bits=w_bits) for w_bits in (2, 4))
    for m, shape in ((16, gate_up), (64, gate_up), (2048, small), (2048, large)):
        yield from (KernelCase(n=shape[0], k=shape[1], m=m, w_bits=w_bits) for w_bits in (2, 4))
    for w_bits, a_bits in ((2, 2), (1, 2), (1, 4)):
        for cut in (True, False):
            yield KernelCase(n=4096, k=4096, m=2048, w_bits=w_bits, a_bits=a_bits, cut=cut)
    yield from (KernelCase(n=22016, k=4096, m=1, w_bits=w_bits) for w_bits in (3, 5, 6, 7, 1, 8))
    for m in (1, 2048):
        yield from (
            KernelCase(n=4096, k=4096, m=m, w_bits=w_bits, group_size=128) for w_bits in (2, 4)
        )
    yield from (KernelCase(n=22016, k=4096, m=1, w_bits=w, group_size=128) for w in (2, 4))
    for m in (1, 16, 2048):
        yield from (KernelCase(n=4096, k=4096, m=m, w_bits=w, a_bits=HALF_BITS) for w in (2, 4))


def _served() -> Iterator[KernelCase]:
    """Layers and heads as the runtime multiplies them: one stream, batches, prompts."""
    alone = [shape for name in ("llama-7b", "llama-3-8b") for shape in LAYERS[name]]
    for n, k in alone:
        yield from (KernelCase(n=n, k=k, m=1, w_bits=w_bits) for w_bits in (2, 4))
    yield from (KernelCase(n=n, k=4096, m=1, w_bits=w) for n, w in HEADS)
    batched = (*LAYERS["llama-3-8b"], (4096, 4096))
    for m in (64, 16):
        yield from (KernelCase(n=n, k=k, m=m, w_bits=4) for n, k in batched)
    for n, k in LAYERS["llama-7b"]:
        yield KernelCase(n=n, k=k, m=1, w_bits=4, a_bits=HALF_BITS)
    for n, k in alone:
        yield KernelCase(n=n, k=k, m=2048, w_bits=4)


GOALS: Sequence[KernelCase] = tuple(_goals())
"""What the issue sets numbers for, in its order."""

SERVED: Sequence[KernelCase] = tuple(_served())
"""What `benchmarks.decode` runs."""

TOY: Sequence[KernelCase] = (
    KernelCase(n=64, k=2048, m=1, w_bits=2),
    KernelCase(n=64, k=256, m=17, w_bits=3),
    KernelCase(n=70, k=512, m=2, w_bits=4, group_size=128),
    KernelCase(n=64, k=256, m=2, w_bits=4, a_bits=HALF_BITS),
)
"""Shows on a CPU that the benchmark runs."""


def all_cases(widths: Sequence[int] = (2, 4, 3, 8, 1, 5, 6, 7)) -> Sequence[KernelCase]:
    """Goals and what is served, then every layer: few tokens first, widths in the given order."""
    shapes = [shape for layers in LAYERS.values() for shape in layers]
    wide = (
        KernelCase(n=n, k=k, m=m, w_bits=w_bits)
        for w_bits in widths
        for m in (1, 16, 64, 2048)
        for n, k in shapes
    )
    rest = (
        KernelCase(n=n, k=k, m=m, w_bits=w_bits)
        for m in TOKENS
        for w_bits in widths
        for n, k in shapes
    )
    return tuple(dict.fromkeys((*GOALS, *SERVED, *wide, *rest)))
