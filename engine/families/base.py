"""What the engine must know of a model family, as a table; torch-free.

A decoder layer is a few linear layers between norms. A `ChannelPair` says that the output channels
of a producer reach the columns of its consumers untouched but for factors, so a factor can move
from one to the other without changing the layer's function:

    norm -> linear      norm weight / s (norm bias - shift, / s)      consumer columns * s
    linear -> linear    producer rows / s (bias likewise)             consumer columns * s

Shape legend: D dimensions of a head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = [
    "ChannelPair",
    "Family",
    "NormKind",
    "PairKind",
    "QueryKeyPair",
    "RowRanges",
    "Sizes",
]

RowRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of a linear's rows, in the order of the channels that they produce."""


class NormKind(StrEnum):
    """How a norm treats its weight."""

    RMS = "rms"
    """``x / rms(x) * weight``."""
    RMS_PLUS_ONE = "rms_plus_one"
    """``x / rms(x) * (1 + weight)``, Gemma's."""
    LAYER = "layer"
    """``(x - mean) / std * weight + bias``."""


class PairKind(StrEnum):
    """What produces the channels."""

    NORM = "norm"
    """A norm: its weight takes the inverse factor."""
    LINEAR = "linear"
    """A linear: its rows take the inverse factor (v -> o, up -> down)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a model that a family's table may depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPair:
    """One producer and everything that reads its channels; names are those inside a layer."""

    name: str
    """As the papers say: `qkv`, `fc1`, `out`, `fc2`."""
    kind: PairKind
    producer: str
    """Module inside the layer: a norm or a linear."""
    consumers: tuple[str, ...]
    """Linears whose columns read all channels."""
    rows: RowRanges | None = None
    """Rows of a fused producer that are the channels; None takes all of them."""
    readers: tuple[str, ...] = ()
    """Other modules with a two-dimensional `weight` that read the channels and stay in full
    precision (a router): their columns take the factor too."""
    repeats: int = 1
    """Consumer heads that read one producer head: query heads in a key-value group (GQA)."""
    head_dim: int | None = None
    """Channels that repeat together, where `repeats` is above one; also: channels of one head,
    within which a rotation may mix them (v -> o). None where channels have no heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryKeyPair:
    """Queries and keys: ``q / s`` and ``k * s`` leave every score as it is.

    A factor is shared by the two channels of a rotary pair, `i` and `i + rotary_dim / 2` of a head,
    and by all query heads of a key-value group.
    """

    query: str
    key: str
    query_rows: RowRanges | None
    key_rows: RowRanges | None
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    """Leading channels of a head that rotate; 0 where positions are added otherwise."""
    query_norm: str | None = None
    """A norm over each head between the linear and the scores: it takes the factor instead, shared
    by all heads."""
    key_norm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family."""

    model_type: str
    norm: NormKind
    layers: str
    """Where the stack of decoder layers is, as `model.layers`."""
    embedding: str
    """Module, as `model.embed_tokens`."""
    final_norm: str
    head: str
    pairs: Callable[[Sizes, Mapping[str, Any]], tuple[ChannelPair, ...]]
    """Of sizes and the kept fields of the config: every pair of a layer."""
    query_key: Callable[[Sizes, Mapping[str, Any]], QueryKeyPair | None]
    residual_writers: tuple[str, ...]
    """Linears that write to the residual stream, as `self_attn.o_proj`; experts by a pattern."""
    rotates: bool = True
    """Whether the residual stream may be rotated: only RMS norms, each directly before linears that
    can take its weight, and nothing else reads or writes the stream."""
    online_hadamard: tuple[str, ...] = ()
    """Linears whose inputs a Hadamard transform may mix at run time, experts by a pattern; empty
    takes the consumers of the pairs named `fc2`."""
