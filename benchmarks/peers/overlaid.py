"""A source model with other weights in its linears, so that our evaluation measures a peer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.architecture import Architecture
from engine.models.loading import SourceModel
from engine.spec import FULL_BITS
from kernels.activation_rounding import round_activations

__all__ = ["OverlaidModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlaidModel:
    """A `BlockModel`; everything but the given weights is the source's."""

    source: SourceModel
    weights: Mapping[str, torch.Tensor]
    """By the full name of the linear: ``[N, K]``."""
    a_bits: int = FULL_BITS
    """What the inputs of those linears are rounded to, for each token, as our engine does it."""

    @property
    def architecture(self) -> Architecture:
        """The sizes."""
        return self.source.architecture

    @property
    def skeleton(self) -> nn.Module:
        """The source's, on the meta device."""
        return self.source.skeleton

    def load_embedding(self) -> torch.Tensor:
        """The source's input embedding."""
        return self.source.load_embedding()

    def load_block(self, index: int) -> nn.Module:
        """Decoder layer `index` with the given weights."""
        block = self.source.load_block(index)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                weight = self._weight_of(index, name)
                module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
                if self.a_bits != FULL_BITS:
                    module.register_forward_pre_hook(self._round_inputs)
        return block

    def load_head(self) -> nn.Module:
        """The source's final norm and output head."""
        return self.source.load_head()

    def load_part(self, name: str) -> nn.Module:
        """Any module outside the layers, the source's."""
        return self.source.load_part(name)

    def _weight_of(self, index: int, name: str) -> torch.Tensor:
        # families differ in what stands before the number of a layer
        ending = f".{index}.{name}"
        found = [each for each in self.weights if each.endswith(ending)]
        assert len(found) == 1, f"{len(found)} weights are called *{ending}"
        return self.weights[found[0]]

    def _round_inputs(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen = inputs[0]
        return (round_activations(seen, self.a_bits).to(seen.dtype), *inputs[1:])
