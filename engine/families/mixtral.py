"""Mixtral: Mistral with experts as its feed-forward layer; the router stays in full precision."""

from engine.families.base import (
    ChannelPair,
    Config,
    ExpertFiles,
    Family,
    LinearShape,
    NormKind,
    PairKind,
    SizeFields,
    Sizes,
    TensorShapes,
)
from engine.families.config import unsupported, whole
from engine.families.decoding import LayerPlan, Windows, always
from engine.families.llama import (
    GATED_FIELDS,
    attention_linears,
    attention_pairs,
    final_norm,
    gated_linears,
    query_key,
    two_norms,
)

__all__ = ["MIXTRAL"]

EXPERTS, ROUTER = "mlp.experts", "mlp.gate"
EXPERT_COUNT, EXPERTS_PER_TOKEN = 8, 2
"""Where the config is silent."""


def _linears(sizes: Sizes, _: Config) -> tuple[LinearShape, ...]:
    experts = [
        linear
        for expert in range(sizes.experts)
        for linear in gated_linears(sizes, module=f"{EXPERTS}.{expert}")
    ]
    return (*attention_linears(sizes), *experts)


def _layer_tensors(sizes: Sizes, config: Config) -> TensorShapes:
    return {**two_norms(sizes, config), f"{ROUTER}.weight": (sizes.experts, sizes.hidden)}


def _pairs(sizes: Sizes, _: Config) -> tuple[ChannelPair, ...]:
    experts = [f"{EXPERTS}.{expert}" for expert in range(sizes.experts)]
    first = ChannelPair(
        name="fc1",
        kind=PairKind.NORM,
        producer="post_attention_layernorm",
        consumers=tuple(f"{each}.{name}" for each in experts for name in ("gate_proj", "up_proj")),
        readers=(ROUTER,),
    )
    second = [
        ChannelPair(
            name=f"fc2.{number}",
            kind=PairKind.LINEAR,
            producer=f"{expert}.up_proj",
            consumers=(f"{expert}.down_proj",),
        )
        for number, expert in enumerate(experts)
    ]
    return (*attention_pairs(sizes), first, *second)


def _implied(config: Config) -> Config:
    counts = {"num_local_experts": EXPERT_COUNT, "num_experts_per_tok": EXPERTS_PER_TOKEN}
    return {name: count for name, count in counts.items() if config.get(name) is None}


def _check(sizes: Sizes, config: Config) -> None:
    if config["num_experts_per_tok"] > sizes.experts:
        raise unsupported(
            "num_experts_per_tok", config["num_experts_per_tok"], f"at most {sizes.experts}"
        )


MIXTRAL = Family(
    model_type="mixtral",
    config_class="MixtralConfig",
    model_class="MixtralForCausalLM",
    norm=NormKind.RMS,
    linears=_linears,
    layer_tensors=_layer_tensors,
    outer_tensors=final_norm,
    pairs=_pairs,
    query_key=query_key(),
    residual_writers=("self_attn.o_proj", f"{EXPERTS}.*.down_proj"),
    fields={**GATED_FIELDS, "num_experts_per_tok": whole(1, 64)},
    size_fields=SizeFields(experts="num_local_experts"),
    implied=_implied,
    check=_check,
    decoding=always(
        LayerPlan(
            up=("gate_proj", "up_proj"),
            down="down_proj",
            router=ROUTER,
            windows=Windows.EVERY_LAYER,
        )
    ),
    experts=ExpertFiles(
        module=EXPERTS,
        count_field="num_experts_per_tok",
        older_names=(
            (".mlp.", ".block_sparse_moe."),
            (".gate_proj.", ".w1."),
            (".up_proj.", ".w3."),
            (".down_proj.", ".w2."),
        ),
    ),
)
