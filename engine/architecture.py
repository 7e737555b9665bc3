"""What a model's `config.json` says before any weight is read; torch-free.

A config is a stranger's file: only the fields listed here are kept, and only within these limits.
The supported families are decoder-only stacks of the same seven linear layers; they differ in
biases, in query and key norms, and in sliding windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import UnsupportedModel

__all__ = [
    "MODEL_TYPES",
    "Architecture",
    "LinearShape",
    "check_config",
    "kept_fields",
]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# the largest published decoders stay well below each of these
LIMITS = {
    "num_hidden_layers": 256,
    "hidden_size": 32_768,
    "intermediate_size": 262_144,
    "vocab_size": 1_000_000,
    "num_attention_heads": 512,
    "num_key_value_heads": 512,
    "head_dim": 1024,
    "max_position_embeddings": 16_777_216,
}
REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
)
OPTIONAL = (
    "max_window_layers", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "layer_types", "hidden_act", "attention_bias",
    "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "initializer_range", "torch_dtype", "dtype",
)  # fmt: skip
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
# "longrope" and "dynamic" change with the length of the request: a block cannot be calibrated alone
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
QWEN3_HEAD_DIM = 128
"""Qwen3's head size where its config is silent; elsewhere hidden size over heads."""
DEFAULT_MAX_POSITIONS = 2048


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

    @property
    def linears_per_layer(self) -> tuple[LinearShape, ...]:
        """The linears of decoder layer 0; all layers have the same."""
        return self.linears[: len(self.linears) // self.layers]

    @property
    def parameter_count(self) -> int:
        """All parameters; tied embeddings count once."""
        linears = sum(each.weights + each.out_features * each.has_bias for each in self.linears)
        qk_norms = 2 * self.head_dim if self.model_type == "qwen3" else 0
        norms = self.layers * (2 * self.hidden + qk_norms) + self.hidden
        return linears + norms + self.embedding_parameters

    @property
    def embedding_parameters(self) -> int:
        """Input embedding and, where it is not tied, the output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)


def check_config(config: Mapping[str, Any]) -> Architecture:
    """Read the sizes out of a parsed `config.json`.

    Raises:
        UnsupportedModel: naming the field, its value and what would do.
    """
    _refuse_foreign_code(config)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise _unsupported("model_type", model_type, f"one of {', '.join(MODEL_TYPES)}")
    sizes = {name: _size(config, name) for name in REQUIRED}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise _unsupported("num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
    head_dim = _size(config, "head_dim", default=_default_head_dim(str(model_type), hidden, heads))
    if head_dim % 2:
        raise _unsupported("head_dim", head_dim, "an even number: rotary positions pair channels")
    _check_values(config, sizes["num_hidden_layers"])
    return Architecture(
        model_type=str(model_type),
        layers=sizes["num_hidden_layers"],
        hidden=hidden,
        intermediate=sizes["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=sizes["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_size(config, "max_position_embeddings", default=DEFAULT_MAX_POSITIONS),
        linears=_linears(config, sizes, kv_heads * head_dim, heads * head_dim),
    )


def kept_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the model class may see of a config; everything else is dropped.

    Raises:
        UnsupportedModel: as `check_config`.
    """
    architecture = check_config(config)
    names = (*REQUIRED, *OPTIONAL)
    kept = {name: config[name] for name in names if config.get(name) is not None}
    return {
        **kept,
        "model_type": architecture.model_type,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "max_position_embeddings": architecture.max_positions,
    }


def _refuse_foreign_code(config: Mapping[str, Any]) -> None:
    if "auto_map" in config:
        raise UnsupportedModel(
            "auto_map", "auto_map asks for code from the repository; only built-in classes are run"
        )
    if config.get("quantization_config") is not None:
        raise UnsupportedModel(
            "quantization_config",
            "quantization_config says the model is quantized already; name its source",
        )


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    limit = LIMITS[name]
    # bool is an int in Python, and True is no size
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise _unsupported(name, value, f"a whole number from 1 to {limit}")
    return value


def _default_head_dim(model_type: str, hidden: int, heads: int) -> int:
    if model_type == "qwen3":
        return QWEN3_HEAD_DIM
    if hidden % heads:
        raise _unsupported("hidden_size", hidden, f"a multiple of {heads} heads")
    return hidden // heads


def _check_values(config: Mapping[str, Any], layers: int) -> None:
    for name in FLAGS:
        if config.get(name) not in (None, True, False):
            raise _unsupported(name, config[name], "true or false")
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise _unsupported("hidden_act", config["hidden_act"], f"one of {', '.join(ACTIVATIONS)}")
    for name in ("rope_scaling", "rope_parameters"):
        _check_rope(name, config.get(name))
    kinds = config.get("layer_types")
    allowed = ("full_attention", "sliding_attention")
    listed = kinds if isinstance(kinds, list) else [None]
    if kinds is not None and (len(listed) != layers or any(k not in allowed for k in listed)):
        raise UnsupportedModel(
            "layer_types", f"layer_types must list one of {', '.join(allowed)} for each layer"
        )


def _check_rope(name: str, rope: Any) -> None:
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise _unsupported(name, rope, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise _unsupported(f"{name}.rope_type", kind, f"one of {', '.join(ROPE_TYPES)}")


def _linears(
    config: Mapping[str, Any], sizes: Mapping[str, int], kv_width: int, width: int
) -> tuple[LinearShape, ...]:
    hidden, intermediate = sizes["hidden_size"], sizes["intermediate_size"]
    model_type = config["model_type"]
    has_flag = model_type in ("llama", "qwen3") and bool(config.get("attention_bias"))
    mlp_bias = model_type == "llama" and bool(config.get("mlp_bias"))
    # qwen2 always has biases on query, key and value, and never on the output
    qkv_bias = model_type == "qwen2" or has_flag
    layer = [
        ("self_attn.q_proj", width, hidden, qkv_bias),
        ("self_attn.k_proj", kv_width, hidden, qkv_bias),
        ("self_attn.v_proj", kv_width, hidden, qkv_bias),
        ("self_attn.o_proj", hidden, width, has_flag),
        ("mlp.gate_proj", intermediate, hidden, mlp_bias),
        ("mlp.up_proj", intermediate, hidden, mlp_bias),
        ("mlp.down_proj", hidden, intermediate, mlp_bias),
    ]
    return tuple(
        LinearShape(
            name=f"model.layers.{index}.{name}",
            out_features=out_features,
            in_features=in_features,
            has_bias=has_bias,
        )
        for index in range(sizes["num_hidden_layers"])
        for name, out_features, in_features, has_bias in layer
    )


def _unsupported(field: str, value: object, remedy: str) -> UnsupportedModel:
    return UnsupportedModel(field, f"{field} = {value!r} is not supported: use {remedy}")
