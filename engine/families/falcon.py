"""Falcon: fused queries, keys and values in three layouts, and LayerNorms that two readers share.

    new architecture (40B, 11B)   per group of heads: queries of the group, one key, one value
    multi-query (7B)              all queries, one key, one value
    neither (RW)                  per head: query, key, value

Shape legend: D dimensions of a head.
"""

from typing import Any

from engine.families.base import (
    ChannelPair,
    Config,
    Family,
    LayerCall,
    LinearShape,
    NormKind,
    PairKind,
    QueryKeyPair,
    RowRanges,
    SizeFields,
    Sizes,
    TensorShapes,
)
from engine.families.config import (
    ACTIVATIONS,
    COMMON_FIELDS,
    ROPE_FIELDS,
    flag,
    number,
    one_of,
    whole,
)
from engine.families.decoding import Arrangement, LayerPlan, Positions

__all__ = ["FALCON"]

FUSED, OUTPUT = "self_attention.query_key_value", "self_attention.dense"
UP, DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
EXPANSION = 4
"""Intermediate size over hidden size where the config is silent."""
FIELDS = {
    **COMMON_FIELDS,
    **ROPE_FIELDS,
    "layer_norm_epsilon": number(0, 1),
    "activation": one_of(*ACTIVATIONS),
    "alibi": flag(),
    "bias": flag(),
    "multi_query": flag(),
    "new_decoder_architecture": flag(),
    "parallel_attn": flag(),
    "num_ln_in_parallel_attn": whole(1, 2),
}


def _implied(config: Config) -> Config:
    """Settle what a config leaves to the class, and what the class ignores."""
    is_new = config.get("new_decoder_architecture") is True
    is_multi_query = config.get("multi_query") is not False
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    fields: dict[str, Any] = {"num_ln_in_parallel_attn": 1}
    if is_new:
        fields = {
            "parallel_attn": True,
            "num_ln_in_parallel_attn": config.get("num_ln_in_parallel_attn") or 2,
        }
    else:
        fields["num_kv_heads"] = 1 if is_multi_query else heads
    if config.get("ffn_hidden_size") is None and isinstance(hidden, int):
        fields["ffn_hidden_size"] = EXPANSION * hidden
    return fields


def _norms(config: Config) -> dict[str, tuple[str, ...]]:
    """Every norm of a layer and what reads it."""
    if config.get("parallel_attn") is False:
        return {"input_layernorm": (FUSED,), "post_attention_layernorm": (UP,)}
    if config["num_ln_in_parallel_attn"] == 2:
        return {"ln_attn": (FUSED,), "ln_mlp": (UP,)}
    return {"input_layernorm": (FUSED, UP)}


def _rows(sizes: Sizes) -> dict[str, RowRanges]:
    """Where queries, keys and values are among the rows of the fused linear, head by head."""
    groups, width = sizes.kv_heads, sizes.head_dim
    queries = sizes.heads // groups
    start = [group * (queries + 2) * width for group in range(groups)]
    key = [each + queries * width for each in start]
    return {
        "query": tuple(zip(start, key, strict=True)),
        "key": tuple((each, each + width) for each in key),
        "value": tuple((each + width, each + 2 * width) for each in key),
    }


def _linears(sizes: Sizes, config: Config) -> tuple[LinearShape, ...]:
    hidden, inner = sizes.hidden, sizes.intermediate
    shapes = {
        FUSED: (hidden + 2 * sizes.kv_heads * sizes.head_dim, hidden),
        OUTPUT: (hidden, hidden),
        UP: (inner, hidden),
        DOWN: (hidden, inner),
    }
    return tuple(
        LinearShape(
            name=name, out_features=rows, in_features=columns, has_bias=bool(config.get("bias"))
        )
        for name, (rows, columns) in shapes.items()
    )


def _layer_tensors(sizes: Sizes, config: Config) -> TensorShapes:
    parts = ("weight", "bias")
    return {f"{norm}.{part}": (sizes.hidden,) for norm in _norms(config) for part in parts}


def _outer_tensors(sizes: Sizes, _: Config) -> TensorShapes:
    return {f"transformer.ln_f.{part}": (sizes.hidden,) for part in ("weight", "bias")}


def _pairs(sizes: Sizes, config: Config) -> tuple[ChannelPair, ...]:
    bias = bool(config.get("bias"))
    norms = [
        ChannelPair(
            name="qkv" if FUSED in readers else "fc1",
            kind=PairKind.NORM,
            producer=norm,
            consumers=readers,
            shifts=bias,
        )
        for norm, readers in _norms(config).items()
    ]
    # a GELU lets no factor pass, so there is none between the two linears of the feed-forward
    output = ChannelPair(
        name="out",
        kind=PairKind.LINEAR,
        producer=FUSED,
        consumers=(OUTPUT,),
        rows=_rows(sizes)["value"],
        repeats=sizes.heads // sizes.kv_heads,
        head_dim=sizes.head_dim,
        shifts=bias,
    )
    return (*norms, output)


def _query_key(sizes: Sizes, config: Config) -> QueryKeyPair:
    rows = _rows(sizes)
    return QueryKeyPair(
        query=FUSED,
        key=FUSED,
        query_rows=rows["query"],
        key_rows=rows["key"],
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rotary_dim=0 if config.get("alibi") else sizes.head_dim,
    )


def _decoding(_: Sizes, config: Config) -> LayerPlan:
    norms = list(_norms(config))
    is_parallel = config.get("parallel_attn") is not False
    return LayerPlan(
        attention_norm=norms[0],
        feed_forward_norm=norms[-1],
        qkv=(FUSED,),
        out=OUTPUT,
        up=(UP,),
        down=DOWN,
        is_gated=False,
        activation_field="activation",
        arrangement=Arrangement.PARALLEL if is_parallel else Arrangement.SEQUENTIAL,
        positions=Positions.ALIBI if config.get("alibi") else Positions.ROTARY,
    )


FALCON = Family(
    model_type="falcon",
    config_class="FalconConfig",
    model_class="FalconForCausalLM",
    norm=NormKind.LAYER,
    linears=_linears,
    layer_tensors=_layer_tensors,
    outer_tensors=_outer_tensors,
    pairs=_pairs,
    query_key=_query_key,
    residual_writers=(OUTPUT, DOWN),
    rotates=False,
    fields=FIELDS,
    size_fields=SizeFields(intermediate="ffn_hidden_size", kv_heads="num_kv_heads", head_dim=None),
    implied=_implied,
    tied=True,
    drops_auto_map=True,
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    decoding=_decoding,
    call=LayerCall(cache="layer_past", returns_tuple=True),
)
