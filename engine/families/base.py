"""What the engine must know of a model family, as a table; torch-free.

A decoder layer is a few linear layers between norms. A `ChannelPair` says that the output channels
of a producer reach the columns of its consumers untouched but for factors, so a factor can move
from one to the other without changing the layer's function:

    norm -> linear      norm weight / s (norm bias - shift, / s)      consumer columns * s
    linear -> linear    producer rows / s (bias likewise)             consumer columns * s

Shape legend: D dimensions of a head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.families.config import FieldRule
from engine.families.decoding import PlanOf, plain_plan
from engine.families.sizes import Config, LinearShape, SizeFields, Sizes

__all__ = [
    "ChannelPair",
    "Config",
    "ExpertFiles",
    "Family",
    "LayerCall",
    "LinearShape",
    "NormKind",
    "PairKind",
    "QueryKeyPair",
    "RowRanges",
    "SizeFields",
    "Sizes",
    "TensorShapes",
]

TensorShapes = Mapping[str, tuple[int, ...]]

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
class LayerCall:
    """How the model calls a decoder layer."""

    cache: str = "past_key_values"
    """The argument that takes keys and values."""
    returns_tuple: bool = False
    """Whether hidden states come first in a tuple."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFiles:
    """Experts of a layer, kept apart here as `<module>.<number>.gate_proj`, whatever files do.

    Files of transformers 5 hold `<module>.gate_up_proj` ``[E, 2 I, H]`` and `<module>.down_proj`
    ``[E, H, I]``; older ones hold every matrix by itself under other names.
    """

    module: str
    """Inside a layer, as `mlp.experts`."""
    older_names: tuple[tuple[str, str], ...]
    """Part of a name here, and what older files have in its place."""
    count_field: str
    """Field of the config: experts that a token visits."""


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
    positive: bool = False
    """Whether factors must be positive: an activation with ``f(x / s) = f(x) / s`` for those alone
    lies between (ReLU)."""
    shifts: bool = False
    """Whether a constant may move along: it reaches the consumers as it is (the weights of an
    attention sum to one; activations and gates let none pass), and both sides have biases."""


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


def nothing(_: Config) -> Config:
    """Imply no field."""
    return {}


def all_positions(sizes: Sizes, _: Config) -> int:
    """Use every position that the config promises."""
    return sizes.positions


def accept(_: Sizes, __: Config) -> None:
    """Refuse nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family; where a default stands, it is what most families have."""

    model_type: str
    config_class: str
    """Of transformers, as the class of the causal language model below."""
    model_class: str
    norm: NormKind
    linears: Callable[[Sizes, Config], tuple[LinearShape, ...]]
    """Of a layer, by their names inside it, in the order of a forward pass."""
    layer_tensors: Callable[[Sizes, Config], TensorShapes]
    """Every other tensor of a layer: norms, routers."""
    outer_tensors: Callable[[Sizes, Config], TensorShapes]
    """Every tensor outside the layers, but for input embedding and head."""
    pairs: Callable[[Sizes, Config], tuple[ChannelPair, ...]]
    """Of sizes and the kept fields of the config: every pair of a layer."""
    query_key: Callable[[Sizes, Config], QueryKeyPair | None]
    residual_writers: tuple[str, ...]
    """Linears that write to the residual stream, as `self_attn.o_proj`; experts by a pattern."""
    rotates: bool = True
    """Whether the residual stream may be rotated: only RMS norms, each directly before linears that
    can take its weight, and nothing else reads or writes the stream."""

    fields: Mapping[str, FieldRule]
    """Of the config, kept beside the sizes; everything else is dropped."""
    size_fields: SizeFields = field(default_factory=SizeFields)
    implied: Callable[[Config], Config] = nothing
    """Fields that follow from others or from the family, whatever the config says of them."""
    check: Callable[[Sizes, Config], None] = accept
    """Refuses sizes and fields that do not go together."""
    usable_positions: Callable[[Sizes, Config], int] = all_positions
    """Tokens that a request may have, where that is less than the config promises."""
    tied: bool = False
    """Whether the head is the input embedding where the config does not say."""
    drops_auto_map: bool = False
    """Whether published configs name code of a repository that transformers has built in since."""

    decoding: PlanOf = plain_plan
    """How a layer runs."""

    layers: str = "model.layers"
    """Where the stack of decoder layers is."""
    embedding: str = "model.embed_tokens"
    beside_embedding: tuple[str, ...] = ()
    """Other modules between tokens and the first layer, where a model has them."""
    final_norm: str = "model.norm"
    before_head: tuple[str, ...] = ()
    """Other modules between final norm and head, where a model has them."""
    head: str = "lm_head"
    has_rotary: bool = True
    """Whether the stack computes rotary positions, in `rotary_emb`."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by the root of the hidden size."""
    attention: str = "sdpa"
    """The implementation in transformers that computes what the family needs."""
    call: LayerCall = field(default_factory=LayerCall)
    experts: ExpertFiles | None = None
    online_hadamard: tuple[str, ...] = ()
    """Linears whose inputs a Hadamard transform may mix at run time, experts by a pattern; empty
    takes the consumers of the pairs named `fc2`."""
