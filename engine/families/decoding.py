"""How a decoder layer of a family runs: what the inference engine is arranged by; torch-free.

Defaults are Llama's. A family that is built otherwise says so in its own table, and the decoder
(`engine.inference.decoder`) has no line that names a family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from engine.families.sizes import Config, Sizes

__all__ = ["Arrangement", "LayerPlan", "PlanOf", "Positions", "Windows", "always", "plain_plan"]


class Arrangement(StrEnum):
    """In which order norms, sums and the two halves of a layer come."""

    SEQUENTIAL = "sequential"
    """``h += attention(norm(h))``, then ``h += feed_forward(norm(h))``."""
    PARALLEL = "parallel"
    """``h += attention(norm(h)) + feed_forward(norm(h))``; the two norms may be one."""
    NORMED_BEHIND = "normed_behind"
    """``h = norm(h + attention(h))``, then ``h = norm(h + feed_forward(h))``."""


class Positions(StrEnum):
    """How a token knows its place."""

    ROTARY = "rotary"
    """Queries and keys turn by it."""
    LEARNED = "learned"
    """A second embedding, the first of `beside_embedding`, is added to the first."""
    ALIBI = "alibi"
    """Scores fall with the distance."""


class Windows(StrEnum):
    """Which layers see the last `sliding_window` tokens alone."""

    NONE = "none"
    """None, whatever the config says."""
    EVERY_LAYER = "every_layer"
    """All, where the config has a window."""
    BY_LAYER = "by_layer"
    """Those that `layer_types` calls sliding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Modules of a layer, by their names inside it, and how they are joined."""

    attention_norm: str = "input_layernorm"
    feed_forward_norm: str = "post_attention_layernorm"
    """The same as `attention_norm` where both halves read one."""
    behind_attention: str | None = None
    """A norm of what attention gives, before it is added."""
    behind_feed_forward: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """One name where they are fused; the rows of each are those of `Family.query_key` and of the
    pair `out` then."""
    out: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gates before what they multiply; inside an expert where there is a router."""
    down: str = "mlp.down_proj"
    router: str | None = None
    """Gives logits, weights and numbers of the experts that each token visits."""
    is_gated: bool = True
    activation_field: str = "hidden_act"
    """Field of the config that names the activation."""
    arrangement: Arrangement = Arrangement.SEQUENTIAL
    positions: Positions = Positions.ROTARY
    position_offset: int = 0
    """Rows of a learned embedding before that of position 0."""
    windows: Windows = Windows.NONE
    score_field: str | None = None
    """Field of the config whose inverse root scales scores; None takes the size of a head."""
    score_cap_field: str | None = None
    """Field of the config that caps scores, where it is not null."""


PlanOf = Callable[[Sizes, Config], LayerPlan]


def plain_plan(_: Sizes, __: Config) -> LayerPlan:
    """Run as Llama does."""
    return LayerPlan()


def always(plan: LayerPlan) -> PlanOf:
    """Give one plan whatever the config says."""

    def plan_of(_: Sizes, __: Config) -> LayerPlan:
        return plan

    return plan_of
