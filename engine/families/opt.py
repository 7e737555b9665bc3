"""OPT: LayerNorms with biases, learned positions, ReLU; the 350M norms behind its sublayers."""

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
    TensorShapes,
)
from engine.families.config import ACTIVATIONS, COMMON_FIELDS, flag, number, one_of
from engine.families.decoding import Arrangement, LayerPlan, Positions

__all__ = ["OPT"]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NORMS = ("self_attn_layer_norm", "final_layer_norm")
DECODER = "model.decoder"
POSITION_OFFSET = 2
"""The first two rows of the position embedding are never read."""
FIELDS = {
    **COMMON_FIELDS,
    "do_layer_norm_before": flag(),
    "_remove_final_layer_norm": flag(),
    "activation_function": one_of(*ACTIVATIONS),
    "enable_bias": flag(),
    "layer_norm_elementwise_affine": flag(only=True),
    "init_std": number(0, 100),
    "dropout": one_of(0.0),
}


def _norms_before(config: Config) -> bool:
    return config.get("do_layer_norm_before") is not False


def _has_bias(config: Config) -> bool:
    return config.get("enable_bias") is not False


def _linears(sizes: Sizes, config: Config) -> tuple[LinearShape, ...]:
    hidden, inner = sizes.hidden, sizes.intermediate
    attention = dict.fromkeys((*QKV, "self_attn.out_proj"), (hidden, hidden))
    return tuple(
        LinearShape(name=name, out_features=rows, in_features=columns, has_bias=_has_bias(config))
        for name, (rows, columns) in {
            **attention,
            "fc1": (inner, hidden),
            "fc2": (hidden, inner),
        }.items()
    )


def _layer_tensors(sizes: Sizes, _: Config) -> TensorShapes:
    return {f"{norm}.{part}": (sizes.hidden,) for norm in NORMS for part in ("weight", "bias")}


def _outer_tensors(sizes: Sizes, config: Config) -> TensorShapes:
    tensors: dict[str, tuple[int, ...]] = {
        f"{DECODER}.embed_positions.weight": (sizes.positions + POSITION_OFFSET, sizes.hidden)
    }
    if sizes.embedding != sizes.hidden:
        tensors[f"{DECODER}.project_in.weight"] = (sizes.hidden, sizes.embedding)
        tensors[f"{DECODER}.project_out.weight"] = (sizes.embedding, sizes.hidden)
    if _norms_before(config) and not config.get("_remove_final_layer_norm"):
        tensors |= {
            f"{DECODER}.final_layer_norm.{part}": (sizes.hidden,) for part in ("weight", "bias")
        }
    return tensors


def _pairs(sizes: Sizes, config: Config) -> tuple[ChannelPair, ...]:
    bias = _has_bias(config)
    pairs = [
        ChannelPair(
            name="out",
            kind=PairKind.LINEAR,
            producer="self_attn.v_proj",
            consumers=("self_attn.out_proj",),
            head_dim=sizes.head_dim,
            shifts=bias,
        )
    ]
    # norms behind a sublayer write the residual stream, which everything reads
    if _norms_before(config):
        norms = zip(("qkv", "fc1"), NORMS, (QKV, ("fc1",)), strict=True)
        pairs += [
            ChannelPair(
                name=name, kind=PairKind.NORM, producer=norm, consumers=linears, shifts=bias
            )
            for name, norm, linears in norms
        ]
    if config.get("activation_function", "relu") == "relu":
        pairs.append(
            ChannelPair(
                name="fc2",
                kind=PairKind.LINEAR,
                producer="fc1",
                consumers=("fc2",),
                positive=True,
            )
        )
    return tuple(pairs)


def _query_key(sizes: Sizes, _: Config) -> QueryKeyPair:
    return QueryKeyPair(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        query_rows=None,
        key_rows=None,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        head_dim=sizes.head_dim,
        rotary_dim=0,
    )


def _implied(_: Config) -> Config:
    # calibration runs a layer in training mode, where the class would drop activations
    return {"dropout": 0.0}


def _decoding(_: Sizes, config: Config) -> LayerPlan:
    before = _norms_before(config)
    return LayerPlan(
        attention_norm=NORMS[0],
        feed_forward_norm=NORMS[1],
        qkv=QKV,
        out="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        is_gated=False,
        activation_field="activation_function",
        arrangement=Arrangement.SEQUENTIAL if before else Arrangement.NORMED_BEHIND,
        positions=Positions.LEARNED,
        position_offset=POSITION_OFFSET,
    )


OPT = Family(
    model_type="opt",
    config_class="OPTConfig",
    model_class="OPTForCausalLM",
    norm=NormKind.LAYER,
    linears=_linears,
    layer_tensors=_layer_tensors,
    outer_tensors=_outer_tensors,
    pairs=_pairs,
    query_key=_query_key,
    residual_writers=("self_attn.out_proj", "fc2"),
    rotates=False,
    fields=FIELDS,
    size_fields=SizeFields(
        intermediate="ffn_dim", kv_heads=None, head_dim=None, embedding="word_embed_proj_dim"
    ),
    implied=_implied,
    tied=True,
    layers=f"{DECODER}.layers",
    embedding=f"{DECODER}.embed_tokens",
    beside_embedding=(f"{DECODER}.embed_positions", f"{DECODER}.project_in"),
    final_norm=f"{DECODER}.final_layer_norm",
    before_head=(f"{DECODER}.project_out",),
    has_rotary=False,
    decoding=_decoding,
)
