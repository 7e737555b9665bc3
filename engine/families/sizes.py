"""The sizes of a model, where a config says them, and the shape of a linear; torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Config", "LinearShape", "SizeFields", "Sizes"]

Config = Mapping[str, Any]
"""The kept fields of a model's config."""


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
    vocab: int = 0
    positions: int = 0
    embedding: int = 0
    """Width of the input embedding; the hidden size but in OPT-350M."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeFields:
    """What the fields of a config are called that hold the sizes."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    intermediate: str = "intermediate_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    """None where there are as many as heads."""
    head_dim: str | None = "head_dim"
    """None where it is always hidden size over heads."""
    vocab: str = "vocab_size"
    positions: str = "max_position_embeddings"
    experts: str | None = None
    embedding: str | None = None
    """None where it is the hidden size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """One linear layer that can be quantized."""

    name: str
    out_features: int
    in_features: int
    has_bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight matrix."""
        return self.out_features * self.in_features
