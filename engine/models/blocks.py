"""A model seen as embedding, decoder blocks and head, wherever its weights are."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from engine.architecture import Architecture
from engine.models.parts import join_exit
from engine.modules.rotated import RotatedEmbedding

__all__ = ["BlockModel", "ResidentModel"]


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

    def load_part(self, name: str) -> nn.Module:
        """A module outside the layers, by its full name: what stands beside the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentModel:
    """A causal language model that is in memory as a whole."""

    architecture: Architecture
    skeleton: nn.Module

    def load_embedding(self) -> torch.Tensor:
        """The input embedding ``[vocab, hidden]``."""
        embedding = self.skeleton.get_submodule(self.architecture.family.embedding)
        if isinstance(embedding, RotatedEmbedding):
            return embedding.rotated_weight()
        return embedding.get_parameter("weight")

    def load_block(self, index: int) -> nn.Module:
        """Decoder layer `index`, the model's own."""
        return self.load_part(self.architecture.layer_name(index))

    def load_head(self) -> nn.Module:
        """Final norm and output head, the model's own."""
        return join_exit(self.skeleton, self.architecture.family, self.load_part)

    def load_part(self, name: str) -> nn.Module:
        """Any module by its full name, the model's own."""
        return self.skeleton.get_submodule(name)
