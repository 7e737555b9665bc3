"""Llama and what is built like it: Mistral, Qwen2, Qwen3; their parts serve other families too."""

from collections.abc import Callable
from typing import Any

from engine.families.base import (
    ChannelPair,
    Config,
    Family,
    LinearShape,
    NormKind,
    PairKind,
    QueryKeyPair,
    Sizes,
    TensorShapes,
)
from engine.families.config import (
    ACTIVATIONS,
    COMMON_FIELDS,
    ROPE_FIELDS,
    flag,
    layer_kinds,
    number,
    one_of,
    whole,
)
from engine.families.decoding import LayerPlan, Windows, always

__all__ = [
    "GATED_FIELDS",
    "LLAMA",
    "MISTRAL",
    "QKV",
    "QWEN2",
    "QWEN3",
    "attention_linears",
    "attention_pairs",
    "final_norm",
    "gated_linears",
    "gated_pairs",
    "query_key",
    "two_norms",
]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QWEN3_HEAD_DIM = 128
"""Qwen3's head size where its config is silent; elsewhere hidden size over heads."""
GATED_FIELDS = {
    **COMMON_FIELDS,
    **ROPE_FIELDS,
    "rms_norm_eps": number(0, 1),
    "hidden_act": one_of(*ACTIVATIONS),
    "sliding_window": whole(1, 16_777_216, nullable=True),
}
"""Of a family with RMS norms, rotary positions and a gated feed-forward layer."""
LLAMA_FIELDS = {
    **GATED_FIELDS,
    "layer_types": layer_kinds(),
    "attention_bias": flag(),
    "mlp_bias": flag(),
    "use_sliding_window": flag(),
    "max_window_layers": whole(0, 256),
}


def attention_linears(
    sizes: Sizes, *, qkv_bias: bool = False, out_bias: bool = False
) -> tuple[LinearShape, ...]:
    """Query, key, value and output, each by itself."""
    width, hidden = sizes.heads * sizes.head_dim, sizes.hidden
    kv_width = sizes.kv_heads * sizes.head_dim
    shapes = [
        LinearShape(name=name, out_features=rows, in_features=hidden, has_bias=qkv_bias)
        for name, rows in zip(QKV, (width, kv_width, kv_width), strict=True)
    ]
    output = LinearShape(
        name="self_attn.o_proj", out_features=hidden, in_features=width, has_bias=out_bias
    )
    return (*shapes, output)


def gated_linears(
    sizes: Sizes, *, module: str = "mlp", bias: bool = False
) -> tuple[LinearShape, ...]:
    """Gate, up and down."""
    inner, hidden = sizes.intermediate, sizes.hidden
    rows = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return tuple(
        LinearShape(
            name=f"{module}.{name}", out_features=shape[0], in_features=shape[1], has_bias=bias
        )
        for name, shape in rows.items()
    )


def attention_pairs(sizes: Sizes, *, shifts: bool = False) -> tuple[ChannelPair, ...]:
    """Input norm to query, key and value; value to output."""
    return (
        ChannelPair(name="qkv", kind=PairKind.NORM, producer="input_layernorm", consumers=QKV),
        ChannelPair(
            name="out",
            kind=PairKind.LINEAR,
            producer="self_attn.v_proj",
            consumers=("self_attn.o_proj",),
            repeats=sizes.heads // sizes.kv_heads,
            head_dim=sizes.head_dim,
            shifts=shifts,
        ),
    )


def gated_pairs(norm: str) -> tuple[ChannelPair, ...]:
    """A norm to gate and up; up to down, past the gate that multiplies."""
    return (
        ChannelPair(
            name="fc1",
            kind=PairKind.NORM,
            producer=norm,
            consumers=("mlp.gate_proj", "mlp.up_proj"),
        ),
        ChannelPair(
            name="fc2",
            kind=PairKind.LINEAR,
            producer="mlp.up_proj",
            consumers=("mlp.down_proj",),
        ),
    )


def query_key(*, normed: bool = False) -> Callable[[Sizes, Config], QueryKeyPair]:
    """Queries and keys of which whole heads rotate; `normed` where each head has a norm."""

    def pair(sizes: Sizes, _: Config) -> QueryKeyPair:
        return QueryKeyPair(
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            query_rows=None,
            key_rows=None,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            rotary_dim=sizes.head_dim,
            query_norm="self_attn.q_norm" if normed else None,
            key_norm="self_attn.k_norm" if normed else None,
        )

    return pair


def two_norms(sizes: Sizes, _: Config) -> TensorShapes:
    """The norms before attention and feed-forward."""
    names = ("input_layernorm", "post_attention_layernorm")
    return {f"{name}.weight": (sizes.hidden,) for name in names}


def final_norm(sizes: Sizes, _: Config) -> TensorShapes:
    """The one norm behind the layers."""
    return {"model.norm.weight": (sizes.hidden,)}


def _biases(config: Config) -> dict[str, bool]:
    """Which of qkv, out and mlp have biases; flags count only in the families that have them."""
    model_type = config["model_type"]
    flagged = model_type in ("llama", "qwen3") and bool(config.get("attention_bias"))
    return {
        # qwen2 always has biases on query, key and value, and never on the output
        "qkv": model_type == "qwen2" or flagged,
        "out": flagged,
        "mlp": model_type == "llama" and bool(config.get("mlp_bias")),
    }


def _linears(sizes: Sizes, config: Config) -> tuple[LinearShape, ...]:
    biases = _biases(config)
    attention = attention_linears(sizes, qkv_bias=biases["qkv"], out_bias=biases["out"])
    return (*attention, *gated_linears(sizes, bias=biases["mlp"]))


def _pairs(sizes: Sizes, config: Config) -> tuple[ChannelPair, ...]:
    shifts = _biases(config)["out"]
    return (*attention_pairs(sizes, shifts=shifts), *gated_pairs("post_attention_layernorm"))


def _normed_heads(sizes: Sizes, config: Config) -> TensorShapes:
    heads = {f"self_attn.{name}.weight": (sizes.head_dim,) for name in ("q_norm", "k_norm")}
    return {**two_norms(sizes, config), **heads}


def _qwen3_head_dim(config: Config) -> Config:
    return {} if config.get("head_dim") is not None else {"head_dim": QWEN3_HEAD_DIM}


def _family(model_type: str, name: str, **others: Any) -> Family:
    values = {"layer_tensors": two_norms, "query_key": query_key(), **others}
    return Family(
        model_type=model_type,
        config_class=f"{name}Config",
        model_class=f"{name}ForCausalLM",
        norm=NormKind.RMS,
        linears=_linears,
        outer_tensors=final_norm,
        pairs=_pairs,
        residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        fields=LLAMA_FIELDS,
        **values,
    )


LLAMA = _family("llama", "Llama")
MISTRAL = _family("mistral", "Mistral", decoding=always(LayerPlan(windows=Windows.EVERY_LAYER)))
QWEN2 = _family("qwen2", "Qwen2", decoding=always(LayerPlan(windows=Windows.BY_LAYER)))
QWEN3 = _family(
    "qwen3",
    "Qwen3",
    layer_tensors=_normed_heads,
    query_key=query_key(normed=True),
    implied=_qwen3_head_dim,
    decoding=always(LayerPlan(windows=Windows.BY_LAYER)),
)
