"""Phi-3: Llama with fused linears: query, key and value in one, gate and up in one."""

from engine.families.base import (
    ChannelPair,
    Config,
    Family,
    LinearShape,
    NormKind,
    PairKind,
    QueryKeyPair,
    SizeFields,
    Sizes,
)
from engine.families.config import ROPE_LISTS, number, rope, unsupported, whole
from engine.families.decoding import LayerPlan, Windows, always
from engine.families.llama import GATED_FIELDS, final_norm, two_norms

__all__ = ["PHI3"]

FUSED, OUTPUT = "self_attn.qkv_proj", "self_attn.o_proj"
GATE_UP, DOWN = "mlp.gate_up_proj", "mlp.down_proj"
ROPE = rope("default", "longrope")
ORIGINAL_POSITIONS = 4096
"""Where the config is silent."""
FIELDS = {
    **GATED_FIELDS,
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "partial_rotary_factor": number(0, 1),
    "original_max_position_embeddings": whole(2, 16_777_216),
}


def _widths(sizes: Sizes) -> tuple[int, int]:
    return sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim


def _linears(sizes: Sizes, _: Config) -> tuple[LinearShape, ...]:
    hidden, inner = sizes.hidden, sizes.intermediate
    width, kv_width = _widths(sizes)
    shapes = {
        FUSED: (width + 2 * kv_width, hidden),
        OUTPUT: (hidden, width),
        GATE_UP: (2 * inner, hidden),
        DOWN: (hidden, inner),
    }
    return tuple(
        LinearShape(name=name, out_features=rows, in_features=columns)
        for name, (rows, columns) in shapes.items()
    )


def _pairs(sizes: Sizes, _: Config) -> tuple[ChannelPair, ...]:
    width, kv_width = _widths(sizes)
    start = width + kv_width
    return (
        ChannelPair(name="qkv", kind=PairKind.NORM, producer="input_layernorm", consumers=(FUSED,)),
        ChannelPair(
            name="out",
            kind=PairKind.LINEAR,
            producer=FUSED,
            consumers=(OUTPUT,),
            rows=((start, start + kv_width),),
            repeats=sizes.heads // sizes.kv_heads,
            head_dim=sizes.head_dim,
        ),
        ChannelPair(
            name="fc1",
            kind=PairKind.NORM,
            producer="post_attention_layernorm",
            consumers=(GATE_UP,),
        ),
        ChannelPair(
            name="fc2",
            kind=PairKind.LINEAR,
            producer=GATE_UP,
            consumers=(DOWN,),
            rows=((sizes.intermediate, 2 * sizes.intermediate),),
        ),
    )


def _query_key(sizes: Sizes, config: Config) -> QueryKeyPair:
    width, kv_width = _widths(sizes)
    return QueryKeyPair(
        query=FUSED,
        key=FUSED,
        query_rows=((0, width),),
        key_rows=((width, width + kv_width),),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rotary_dim=_rotary_dim(sizes.head_dim, config),
    )


def _rope(config: Config) -> Config:
    """The rotary parameters, under their older name or the newer one."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _is_long(config: Config) -> bool:
    return "longrope" in (_rope(config).get("rope_type"), _rope(config).get("type"))


def _rotary_dim(head_dim: int, config: Config) -> int:
    inner = _rope(config).get("partial_rotary_factor")
    factor: float = config.get("partial_rotary_factor", 1.0) if inner is None else inner
    return int(head_dim * factor)


def _usable_positions(sizes: Sizes, config: Config) -> int:
    """Within the original positions longrope's frequencies are always the short ones."""
    original: int = config.get("original_max_position_embeddings", ORIGINAL_POSITIONS)
    return min(sizes.positions, original) if _is_long(config) else sizes.positions


def _check(sizes: Sizes, config: Config) -> None:
    rotary = _rotary_dim(sizes.head_dim, config)
    if rotary % 2 or not 0 < rotary <= sizes.head_dim:
        raise unsupported(
            "partial_rotary_factor",
            rotary / sizes.head_dim,
            "a part of a head whose channels pair",
        )
    for name in ROPE_LISTS if _is_long(config) else ():
        factors = _rope(config).get(name)
        if factors is None or len(factors) != rotary // 2:
            raise unsupported(f"rope_scaling.{name}", factors, f"a list of {rotary // 2} numbers")


PHI3 = Family(
    model_type="phi3",
    config_class="Phi3Config",
    model_class="Phi3ForCausalLM",
    norm=NormKind.RMS,
    linears=_linears,
    layer_tensors=two_norms,
    outer_tensors=final_norm,
    pairs=_pairs,
    query_key=_query_key,
    residual_writers=(OUTPUT, DOWN),
    fields=FIELDS,
    size_fields=SizeFields(head_dim=None),
    check=_check,
    usable_positions=_usable_positions,
    drops_auto_map=True,
    decoding=always(
        LayerPlan(qkv=(FUSED,), out=OUTPUT, up=(GATE_UP,), down=DOWN, windows=Windows.EVERY_LAYER)
    ),
)
