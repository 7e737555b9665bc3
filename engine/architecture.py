"""What a model's `config.json` says before any weight is read; torch-free.

A config is a stranger's file: only the fields that the family lists are kept, and only within its
limits (`engine.families`). Nothing here knows a module's name; the family's table does.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from engine.errors import UnsupportedModel
from engine.families.base import ChannelPair, Family, QueryKeyPair
from engine.families.config import unsupported
from engine.families.decoding import LayerPlan
from engine.families.reading import read_fields, read_sizes
from engine.families.registry import FAMILIES
from engine.families.sizes import LinearShape, Sizes
from engine.families.stored import StoredPart, find_part

__all__ = [
    "MODEL_TYPES",
    "Architecture",
    "LinearShape",
    "check_config",
    "kept_fields",
]

MODEL_TYPES = tuple(FAMILIES)

OTHER_NAMES = {"gemma3": "gemma3_text, the text model alone"}
"""What to name instead of a type that is close to a supported one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a supported model."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int
    linears: tuple[LinearShape, ...]
    """In the order in which a forward pass meets them, by full name."""
    sizes: Sizes
    fields: Mapping[str, Any] = field(hash=False)
    """Those of the config that are kept."""

    @property
    def family(self) -> Family:
        """The table of the model's family."""
        return FAMILIES[self.model_type]

    @property
    def pairs(self) -> tuple[ChannelPair, ...]:
        """Every producer and consumer of channels in a layer."""
        return self.family.pairs(self.sizes, self.fields)

    @property
    def query_key(self) -> QueryKeyPair | None:
        """Where a factor may move between queries and keys."""
        return self.family.query_key(self.sizes, self.fields)

    @property
    def plan(self) -> LayerPlan:
        """How a layer runs."""
        return self.family.decoding(self.sizes, self.fields)

    @property
    def last_linears(self) -> tuple[str, ...]:
        """The feed-forward's last linears, by their names inside a layer; one for each expert."""
        fed = [pair for pair in self.pairs if pair.name.startswith("fc2")]
        # an activation that lets no factor pass leaves no pair
        return tuple(name for pair in fed for name in pair.consumers) or (self.plan.down,)

    @property
    def linears_per_layer(self) -> tuple[LinearShape, ...]:
        """The linears of decoder layer 0; all layers have the same."""
        return self.linears[: len(self.linears) // self.layers]

    @property
    def active_weights_per_layer(self) -> int:
        """Weights of a layer's linears that one token is multiplied with."""
        experts = self.family.experts
        weights = sum(each.weights for each in self.linears_per_layer)
        if experts is None:
            return weights
        inside = f".{experts.module}."
        apart = sum(each.weights for each in self.linears_per_layer if inside in each.name)
        chosen: int = self.fields[experts.count_field]
        return weights - apart + apart * chosen // self.sizes.experts

    @property
    def parameter_count(self) -> int:
        """All parameters; tied embeddings count once."""
        linears = sum(each.weights + each.out_features * each.has_bias for each in self.linears)
        layer = self.family.layer_tensors(self.sizes, self.fields)
        outer = self.family.outer_tensors(self.sizes, self.fields)
        others = self.layers * sum(map(prod, layer.values())) + sum(map(prod, outer.values()))
        return linears + others + self.embedding_parameters

    @property
    def embedding_parameters(self) -> int:
        """Input embedding and, where it is not tied, the output head."""
        return self.vocab * self.sizes.embedding * (1 if self.tied else 2)

    @property
    def embedding_name(self) -> str:
        """Full name of the input embedding's weight."""
        return f"{self.family.embedding}.weight"

    @property
    def head_name(self) -> str:
        """Full name of the output head's weight."""
        return f"{self.family.head}.weight"

    def layer_name(self, index: int) -> str:
        """Full name of a decoder layer, as `model.layers.3`."""
        return f"{self.family.layers}.{index}"

    def find_stored(self, name: str, stored: Container[str]) -> StoredPart | None:
        """Find a tensor of the model among the names of its files."""
        return find_part(self.family, name, stored)


def check_config(config: Mapping[str, Any]) -> Architecture:
    """Read the sizes out of a parsed `config.json`.

    Raises:
        UnsupportedModel: naming the field, its value and what would do.
    """
    family = _find_family(config)
    implied = {**config, **family.implied(config)}
    sizes = read_sizes(family, implied)
    fields = read_fields(family, implied, sizes)
    family.check(sizes, fields)
    return Architecture(
        model_type=family.model_type,
        layers=sizes.layers,
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab=sizes.vocab,
        tied=bool(fields.get("tie_word_embeddings", family.tied)),
        max_positions=family.usable_positions(sizes, fields),
        linears=_all_linears(family, sizes, fields),
        sizes=sizes,
        fields=fields,
    )


def kept_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the model class may see of a config; everything else is dropped.

    Raises:
        UnsupportedModel: as `check_config`.
    """
    return dict(check_config(config).fields)


def _find_family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if "auto_map" in config and not (family and family.drops_auto_map):
        raise UnsupportedModel(
            "auto_map", "auto_map asks for code from the repository; only built-in classes are run"
        )
    if config.get("quantization_config") is not None:
        raise UnsupportedModel(
            "quantization_config",
            "quantization_config says the model is quantized already; name its source",
        )
    if family is None:
        remedy = OTHER_NAMES.get(str(model_type), f"one of {', '.join(MODEL_TYPES)}")
        raise unsupported("model_type", model_type, remedy)
    return family


def _all_linears(
    family: Family, sizes: Sizes, fields: Mapping[str, Any]
) -> tuple[LinearShape, ...]:
    layer = family.linears(sizes, fields)
    return tuple(
        LinearShape(
            name=f"{family.layers}.{index}.{each.name}",
            out_features=each.out_features,
            in_features=each.in_features,
            has_bias=each.has_bias,
        )
        for index in range(sizes.layers)
        for each in layer
    )
