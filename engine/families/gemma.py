"""Gemma 2 and the text models of Gemma 3: norms before and behind attention and feed-forward.

The norms behind write to the residual stream with a weight of their own, so it cannot be rotated.
"""

from typing import Any

from engine.families.base import (
    ChannelPair,
    Config,
    Family,
    LinearShape,
    NormKind,
    Sizes,
    TensorShapes,
)
from engine.families.config import ACTIVATIONS, flag, layer_kinds, number, one_of, whole
from engine.families.decoding import LayerPlan, Windows, always
from engine.families.llama import (
    GATED_FIELDS,
    attention_linears,
    attention_pairs,
    final_norm,
    gated_linears,
    gated_pairs,
    query_key,
)

__all__ = ["GEMMA2", "GEMMA3_TEXT"]

HEAD_DIM = 256
"""Where the config is silent."""
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
PLAN = LayerPlan(
    attention_norm=NORMS[0],
    behind_attention=NORMS[1],
    feed_forward_norm=NORMS[2],
    behind_feed_forward=NORMS[3],
    activation_field="hidden_activation",
    windows=Windows.BY_LAYER,
    score_field="query_pre_attn_scalar",
    score_cap_field="attn_logit_softcapping",
)
SOFT_CAP = number(1e-3, 1e6, nullable=True)
FIELDS = {
    **{name: rule for name, rule in GATED_FIELDS.items() if name != "hidden_act"},
    "hidden_activation": one_of(*ACTIVATIONS),
    # of layers that slide there always are some, so null can only mean the default
    "sliding_window": whole(1, 16_777_216),
    "layer_types": layer_kinds(),
    "attention_bias": flag(),
    "query_pre_attn_scalar": whole(1, 1_000_000),
    "final_logit_softcapping": SOFT_CAP,
    "use_bidirectional_attention": flag(only=False),
}


def _linears(sizes: Sizes, config: Config) -> tuple[LinearShape, ...]:
    bias = bool(config.get("attention_bias"))
    return (*attention_linears(sizes, qkv_bias=bias, out_bias=bias), *gated_linears(sizes))


def _pairs(sizes: Sizes, config: Config) -> tuple[ChannelPair, ...]:
    shifts = bool(config.get("attention_bias"))
    return (*attention_pairs(sizes, shifts=shifts), *gated_pairs("pre_feedforward_layernorm"))


def _four_norms(sizes: Sizes, _: Config) -> TensorShapes:
    return {f"{name}.weight": (sizes.hidden,) for name in NORMS}


def _normed_heads(sizes: Sizes, config: Config) -> TensorShapes:
    heads = {f"self_attn.{name}.weight": (sizes.head_dim,) for name in ("q_norm", "k_norm")}
    return {**_four_norms(sizes, config), **heads}


def _implied(config: Config) -> Config:
    return {} if config.get("head_dim") is not None else {"head_dim": HEAD_DIM}


def _family(model_type: str, name: str, config_class: str, **others: Any) -> Family:
    return Family(
        model_type=model_type,
        config_class=config_class,
        model_class=f"{name}ForCausalLM",
        norm=NormKind.RMS_PLUS_ONE,
        linears=_linears,
        outer_tensors=final_norm,
        pairs=_pairs,
        residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        rotates=False,
        implied=_implied,
        tied=True,
        scales_embedding=True,
        decoding=always(PLAN),
        **others,
    )


GEMMA2 = _family(
    "gemma2",
    "Gemma2",
    "Gemma2Config",
    layer_tensors=_four_norms,
    query_key=query_key(),
    fields={**FIELDS, "attn_logit_softcapping": SOFT_CAP},
    # sdpa cannot cap the scores
    attention="eager",
)
GEMMA3_TEXT = _family(
    "gemma3_text",
    "Gemma3",
    "Gemma3TextConfig",
    layer_tensors=_normed_heads,
    query_key=query_key(normed=True),
    fields={
        **FIELDS,
        "rope_local_base_freq": number(1, 1e12),
        "sliding_window_pattern": whole(1, 256),
    },
)
