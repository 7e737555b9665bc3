"""Bringing a model class of transformers into the form that the engine works on.

Every linear is an `nn.Linear`, every expert has its own, and buffers that no file holds are real.
"""

import math

import torch
from torch import nn
from transformers import PretrainedConfig

from engine.architecture import Architecture
from engine.models.experts import SeparateExperts

__all__ = ["adapt_model", "fill_buffers"]


def adapt_model(model: nn.Module, architecture: Architecture) -> None:
    """Replace the linears and experts of a model on the meta device."""
    for name, module in list(model.named_modules()):
        # a subclass that rounds once more between product and bias; only 16-bit weights show it
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            has_bias = "bias" in module.state_dict()
            plain = nn.Linear(module.in_features, module.out_features, bias=has_bias)
            model.set_submodule(name, plain)
    experts = architecture.family.experts
    if experts is None:
        return
    for index in range(architecture.layers):
        name = f"{architecture.layer_name(index)}.{experts.module}"
        activation = model.get_submodule(f"{name}.act_fn")
        model.set_submodule(name, SeparateExperts(architecture.sizes, activation))


def fill_buffers(model: nn.Module, config: PretrainedConfig, architecture: Architecture) -> None:
    """Compute what the constructor computes and no file stores; call outside the meta device."""
    family = architecture.family
    if family.has_rotary:
        stack = model.get_submodule(family.layers.rpartition(".")[0])
        rotary: type = type(stack.get_submodule("rotary_emb"))
        stack.rotary_emb = rotary(config=config)
    if family.scales_embedding:
        embedding = model.get_submodule(family.embedding)
        embedding.embed_scale = torch.tensor(math.sqrt(architecture.hidden))
