"""Decoder layers out of a loaded checkpoint, by the family's table.

Every layer of the model is emptied as soon as its decoder layer stands, so that planes and slices
of the same weights never lie side by side for more than one layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.checkpoint.reader import LoadedModel
from engine.families.decoding import Arrangement, LayerPlan, Positions, Windows
from engine.inference.decoder.attention import Attention, Heads
from engine.inference.decoder.device import Device
from engine.inference.decoder.feed_forward import Experts, FeedForward, Gated
from engine.inference.decoder.layers import (
    Layer,
    NormedBehindLayer,
    Norms,
    ParallelLayer,
    SequentialLayer,
)
from engine.inference.decoder.operands import Activation
from engine.inference.decoder.positions import PositionTables
from engine.inference.decoder.projection import Projection
from engine.inference.decoder.stored import join_linears
from kernels.attention import Scoring
from kernels.kv_append import HeadNorms
from kernels.layer_math import Norm, NormKind

__all__ = ["build_layers", "norm_of", "projection_of"]

LAYERS: Mapping[Arrangement, Callable[..., Layer]] = {
    Arrangement.SEQUENTIAL: SequentialLayer,
    Arrangement.PARALLEL: ParallelLayer,
    Arrangement.NORMED_BEHIND: NormedBehindLayer,
}
SLIDING = "sliding_attention"


def build_layers(loaded: LoadedModel, device: Device, positions: int) -> Iterator[Layer]:
    """Build layer by layer, emptying the model.

    Args:
        loaded: left without its layers.
        device: that the model lies on.
        positions: tokens that a sequence may have.
    """
    tables = PositionTables(loaded, positions)
    for index in range(loaded.architecture.layers):
        yield _LayerParts(loaded=loaded, device=device, index=index).build(tables)
        loaded.model.set_submodule(loaded.architecture.layer_name(index), nn.Identity())


def projection_of(
    device: Device, linears: Sequence[nn.Module], rows: torch.Tensor | None = None
) -> Projection:
    """Join linears with inputs in common, and derive what the device multiplies with."""
    joined = join_linears(linears, rows)
    return Projection(parts=tuple(device.matrix(each) for each in joined))


def norm_of(module: nn.Module, kind: NormKind) -> Norm:
    """Read a norm of a transformers model."""
    eps = next(
        value
        for name in ("variance_epsilon", "eps")
        if (value := getattr(module, name, None)) is not None
    )
    bias = getattr(module, "bias", None)
    return Norm(
        kind=kind,
        weight=module.get_parameter("weight").detach(),
        eps=float(eps),
        bias=None if bias is None else bias.detach(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _LayerParts:
    """One layer of a loaded model."""

    loaded: LoadedModel
    device: Device
    index: int

    def build(self, tables: PositionTables) -> Layer:
        plan = self._plan
        shared = plan.feed_forward_norm == plan.attention_norm
        norms = Norms(
            attention=self._norm(plan.attention_norm),
            feed_forward=None if shared else self._norm(plan.feed_forward_norm),
            behind_attention=self._norm_or_none(plan.behind_attention),
            behind_feed_forward=self._norm_or_none(plan.behind_feed_forward),
        )
        return LAYERS[plan.arrangement](
            norms=norms, attention=self._attention(tables), feed_forward=self._feed_forward()
        )

    @property
    def _plan(self) -> LayerPlan:
        return self.loaded.architecture.plan

    @property
    def _config(self) -> Any:
        """Of transformers, with the defaults of what the checkpoint's config is silent of."""
        return self.loaded.model.config

    def _module(self, name: str) -> nn.Module:
        return self.loaded.model.get_submodule(
            f"{self.loaded.architecture.layer_name(self.index)}.{name}"
        )

    def _norm(self, name: str) -> Norm:
        return norm_of(self._module(name), NormKind(self.loaded.architecture.family.norm))

    def _norm_or_none(self, name: str | None) -> Norm | None:
        return None if name is None else self._norm(name)

    def _projection(self, names: Sequence[str], rows: torch.Tensor | None = None) -> Projection:
        return projection_of(self.device, [self._module(name) for name in names], rows)

    def _attention(self, tables: PositionTables) -> Attention:
        architecture, plan = self.loaded.architecture, self._plan
        pair = architecture.query_key
        assert pair is not None, "every family says where its queries and keys are"
        norms = None
        if pair.query_norm is not None and pair.key_norm is not None:
            norms = HeadNorms(query=self._norm(pair.query_norm), key=self._norm(pair.key_norm))
        return Attention(
            qkv=self._projection(plan.qkv, self._rows()),
            out=self._projection((plan.out,)),
            heads=Heads(
                queries=architecture.heads,
                keys=architecture.kv_heads,
                dims=architecture.head_dim,
            ),
            scoring=self._scoring(),
            query_bits=self.loaded.spec.q_bits,
            norms=norms,
            rotary=tables.rotary(self.index) if plan.positions is Positions.ROTARY else None,
            biases=tables.biases() if plan.positions is Positions.ALIBI else None,
        )

    def _rows(self) -> torch.Tensor | None:
        """Bring the rows of a fused linear into the order of queries, keys and values."""
        architecture = self.loaded.architecture
        if len(self._plan.qkv) > 1:
            return None
        pair = architecture.query_key
        values = next(each.rows for each in architecture.pairs if each.name == "out")
        assert pair is not None, "every family says where its queries and keys are"
        ranges = (*(pair.query_rows or ()), *(pair.key_rows or ()), *(values or ()))
        order = [row for start, stop in ranges for row in range(start, stop)]
        if order == list(range(len(order))):
            return None
        like = self._module(self._plan.attention_norm).get_parameter("weight")
        return torch.tensor(order, device=like.device)

    def _scoring(self) -> Scoring:
        plan, config = self._plan, self._config
        divisor = self.loaded.architecture.head_dim
        if plan.score_field is not None:
            divisor = getattr(config, plan.score_field)
        cap = None if plan.score_cap_field is None else getattr(config, plan.score_cap_field, None)
        return Scoring(softmax_scale=divisor**-0.5, window=self._window(), soft_cap=cap)

    def _window(self) -> int | None:
        match self._plan.windows:
            case Windows.NONE:
                return None
            case Windows.BY_LAYER if self._config.layer_types[self.index] != SLIDING:
                return None
            case Windows.EVERY_LAYER | Windows.BY_LAYER:
                window: int | None = getattr(self._config, "sliding_window", None)
                return window

    def _feed_forward(self) -> FeedForward:
        plan, family = self._plan, self.loaded.architecture.family
        if plan.router is None or family.experts is None:
            return self._gated("")
        return Experts(
            router=self._module(plan.router),
            experts=tuple(
                self._gated(f"{family.experts.module}.{number}.")
                for number in range(self.loaded.architecture.sizes.experts)
            ),
        )

    def _gated(self, prefix: str) -> Gated:
        plan = self._plan
        return Gated(
            up=self._projection([f"{prefix}{name}" for name in plan.up]),
            down=self._projection((f"{prefix}{plan.down}",)),
            activation=Activation(
                name=getattr(self._config, plan.activation_field), is_gated=plan.is_gated
            ),
        )
