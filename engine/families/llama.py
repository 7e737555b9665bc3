"""Llama and what is built like it: Mistral, Qwen2, Qwen3."""

from collections.abc import Mapping
from typing import Any

from engine.families.base import (
    ChannelPair,
    Family,
    NormKind,
    PairKind,
    QueryKeyPair,
    Sizes,
)

__all__ = ["LLAMA", "MISTRAL", "QWEN2", "QWEN3"]


def _pairs(sizes: Sizes, _: Mapping[str, Any]) -> tuple[ChannelPair, ...]:
    return (
        ChannelPair(
            name="qkv",
            kind=PairKind.NORM,
            producer="input_layernorm",
            consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        ChannelPair(
            name="out",
            kind=PairKind.LINEAR,
            producer="self_attn.v_proj",
            consumers=("self_attn.o_proj",),
            repeats=sizes.heads // sizes.kv_heads,
            head_dim=sizes.head_dim,
        ),
        ChannelPair(
            name="fc1",
            kind=PairKind.NORM,
            producer="post_attention_layernorm",
            consumers=("mlp.gate_proj", "mlp.up_proj"),
        ),
        ChannelPair(
            name="fc2",
            kind=PairKind.LINEAR,
            producer="mlp.up_proj",
            consumers=("mlp.down_proj",),
        ),
    )


def _query_key(sizes: Sizes, config: Mapping[str, Any]) -> QueryKeyPair:
    normed = config.get("model_type") == "qwen3"
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


def _family(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        norm=NormKind.RMS,
        layers="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        pairs=_pairs,
        query_key=_query_key,
        residual_writers=("self_attn.o_proj", "mlp.down_proj"),
    )


LLAMA = _family("llama")
MISTRAL = _family("mistral")
QWEN2 = _family("qwen2")
QWEN3 = _family("qwen3")
