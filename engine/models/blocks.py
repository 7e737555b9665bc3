"""A model seen as embedding, decoder blocks and head, wherever its weights are."""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn

from engine.architecture import Architecture
from engine.modules.rotated import RotatedEmbedding

__all__ = ["BlockModel", "ResidentModel", "block_name"]


class BlockModel(Protocol):
    """Gives the parts of a model one after the other; parts are in evaluation mode."""

    @property
    def architecture(self) -> Architecture:
        """The sizes."""

    @property
    def skeleton(self) -> nn.Module:
        """The whole model; its weights may be on the meta device, rotary frequencies are real."""

    def load_embedding(self) -> torch.Tensor:
        """The input embedding ``[vocab, hidden]``."""

    def load_block(self, index: int) -> nn.Module:
        """Decoder layer `index`."""

    def load_head(self) -> nn.Module:
        """Final norm and output head: hidden states in, logits out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentModel:
    """A causal language model that is in memory as a whole."""

    architecture: Architecture
    skeleton: nn.Module

    def load_embedding(self) -> torch.Tensor:
        """The input embedding ``[vocab, hidden]``."""
        embedding = self.skeleton.get_submodule("model.embed_tokens")
        if isinstance(embedding, RotatedEmbedding):
            return embedding.rotated_weight()
        return embedding.get_parameter("weight")

    def load_block(self, index: int) -> nn.Module:
        """Decoder layer `index`, the model's own."""
        return cast("nn.ModuleList", self.skeleton.get_submodule("model.layers"))[index]

    def load_head(self) -> nn.Module:
        """Final norm and output head, the model's own."""
        names = ("model.norm", "lm_head")
        return nn.Sequential(*(self.skeleton.get_submodule(name) for name in names))


def block_name(index: int) -> str:
    """Full name of a decoder layer."""
    return f"model.layers.{index}"
