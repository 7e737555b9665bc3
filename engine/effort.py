"""How much a bit search measures: its units, its windows and its cost, from sizes; torch-free.

A candidate is one unit at one width. Every candidate runs its own block once, and of each unit
`anchors` candidates run on through all later blocks and the head:

    flops = tokens (sum over candidates of 2 W_block + sum over anchors of 2 (W_rest + W_head))

with W the weights of the block, of the blocks behind it, and of the output head. Anchors of inputs
come on top of those of weights; with a single one, inputs are scaled from that of the weights.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from engine.architecture import Architecture, LinearShape
from engine.reach import activation_choices, weight_choices
from engine.spec import FULL_BITS, QuantSpec

__all__ = [
    "SearchPlan",
    "SearchUnit",
    "anchors_of",
    "follows_inputs",
    "plan_search",
    "search_units",
]

MAX_LENGTH = 256
"""Tokens in a window of the search; a longer one tells little more of rounding."""
DEGREES = (
    (8, 1024), (3, 1024), (2, 1024), (1, 1024), (1, 512), (1, 256),
)  # fmt: skip
"""Anchors of a unit and tokens, from the most exact to the cheapest."""
MAX_FLOPS = {"cpu": 1.5e13, "cuda": 5e15}
"""Some minutes of two CPU cores, or of one large GPU in fp32; not measured."""
WAVE_BYTES = 2 * 1024**3
"""Hidden states of followed candidates that wait at once, unless one block has more."""
WAVE_BLOCKS = 8
HIDDEN_BYTES = 4
"""Activations are fp32."""
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchUnit:
    """What gets its bits together: a linear, or the same linear of all experts of a layer."""

    name: str
    """Full name, or the pattern that matches the experts'."""
    linears: tuple[LinearShape, ...]
    w_choices: tuple[int, ...]
    a_choices: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Elements of all its matrices."""
        return sum(each.weights for each in self.linears)

    @property
    def is_pinned(self) -> bool:
        """Whether an override leaves no choice of weight bits."""
        return len(self.w_choices) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """How much is measured."""

    windows: int
    length: int
    """Tokens in a window."""
    anchors: int
    """Widths of each unit whose effect is followed to the logits; others are scaled from them."""
    wave_blocks: int
    """Blocks whose followed candidates wait in memory together; a kill loses at most these."""
    wave_bytes: int
    """What their hidden states take."""
    flops: float


def plan_search(
    architecture: Architecture, spec: QuantSpec, units: Iterable[SearchUnit], device_type: str
) -> SearchPlan:
    """Choose the most exact measurement within `MAX_FLOPS`; the cheapest where none is."""
    limit = MAX_FLOPS.get(device_type, MAX_FLOPS["cpu"])
    counts = [_measured(each) for each in units]
    plans = [_plan(architecture, spec, counts, degree) for degree in DEGREES]
    return next((each for each in plans if each.flops <= limit), plans[-1])


def search_units(architecture: Architecture, spec: QuantSpec) -> list[SearchUnit]:
    """List what gets bits, in the order of the forward pass; full-precision layers are left out."""
    found: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[LinearShape]] = {}
    for linear in architecture.linears:
        choices = weight_choices(spec, linear.name), activation_choices(spec, linear.name)
        key = (EXPERT.sub(".experts.*.", linear.name), *choices)
        found.setdefault(key, []).append(linear)
    names = [name for name, _, _ in found]
    units = []
    for (name, w_choices, a_choices), linears in found.items():
        if w_choices == (FULL_BITS,):
            continue
        # experts that an override treats apart cannot share a pattern with the others
        apart = "*" in name and names.count(name) > 1
        groups = [(each.name, [each]) for each in linears] if apart else [(name, linears)]
        units += [
            SearchUnit(name=each, linears=tuple(group), w_choices=w_choices, a_choices=a_choices)
            for each, group in groups
        ]
    return units


def anchors_of(widths: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Choose the widths that are followed to the logits: spread evenly, the middle one first."""
    if count >= len(widths):
        return widths
    if count == 1:
        return (widths[(len(widths) - 1) // 2],)
    last = len(widths) - 1
    return tuple(widths[round(index * last / (count - 1))] for index in range(count))


def follows_inputs(anchors: int) -> bool:
    """Whether rounded inputs are followed to the logits on their own."""
    return anchors > 1


def _measured(unit: SearchUnit) -> tuple[int, int]:
    """Widths of weights and of inputs that change anything."""
    return (
        sum(each != FULL_BITS for each in unit.w_choices),
        sum(each != FULL_BITS for each in unit.a_choices),
    )


def _plan(
    architecture: Architecture,
    spec: QuantSpec,
    counts: list[tuple[int, int]],
    degree: tuple[int, int],
) -> SearchPlan:
    most, tokens = degree
    anchors = max((min(most, each) for pair in counts for each in pair), default=0)
    length = min(spec.calibration.length, MAX_LENGTH)
    windows = max(1, min(spec.calibration.samples, tokens // length))
    block = 2 * sum(each.weights for each in architecture.linears) / architecture.layers
    head = 2 * architecture.vocab * architecture.hidden
    candidates = sum(sum(pair) for pair in counts)
    followed = sum(
        min(anchors, weights) + follows_inputs(anchors) * min(anchors, inputs)
        for weights, inputs in counts
    )
    # a block has half of the others behind it on average
    each_followed = block * (architecture.layers - 1) / 2 + head
    chain = HIDDEN_BYTES * windows * length * architecture.hidden
    block_bytes = max(1, chain * -(-followed // architecture.layers))
    wave_blocks = max(1, min(WAVE_BLOCKS, WAVE_BYTES // block_bytes))
    return SearchPlan(
        windows=windows,
        length=length,
        anchors=anchors,
        wave_blocks=wave_blocks,
        wave_bytes=wave_blocks * block_bytes,
        flops=windows * length * (candidates * block + followed * each_followed),
    )
