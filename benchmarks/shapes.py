"""Sizes of published models, and sources of random weights that have them.

A source holds a few decoder layers and a small vocabulary: what is measured is one layer, and an
embedding of the real size would only fill the disk. Weights are normal with deviation 0.02, norms
about one, biases small; they have no outliers, so times and bytes mean something and losses do not.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.architecture import Architecture, check_config

__all__ = ["SHAPES", "VOCABULARY", "layers_of", "write_source"]

VOCABULARY = 1024
"""Instead of the real one."""
DEVIATION = 0.02
NORM_DEVIATION = 0.1
SEED = 7


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
        **others,
    }  # fmt: skip


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-7b": _sizes(4096, 11008, 32, 32, 32),
    "llama-13b": _sizes(5120, 13824, 40, 40, 40),
    "llama-3-8b": _sizes(4096, 14336, 32, 32, 8, rope_theta=500000.0),
    "llama-70b": _sizes(8192, 28672, 80, 64, 8),
    "qwen2.5-7b": _sizes(3584, 18944, 28, 28, 4, model_type="qwen2", rope_theta=1000000.0),
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, rope_theta=100000.0),
    "tiny": _sizes(64, 128, 4, 4, 2),
}
"""From the models' `config.json`, but for the vocabulary; `tiny` is nobody's."""


def layers_of(shape: str) -> int:
    """Decoder layers of the whole model."""
    return int(SHAPES[shape]["num_hidden_layers"])


def write_source(shape: str, blocks: int, folder: Path) -> Path:
    """Write a model directory of a shape with `blocks` decoder layers, one file each.

    Args:
        shape: one of `SHAPES`.
        blocks: at least 1.
        folder: exists and is empty.
    """
    config = {**SHAPES[shape], "num_hidden_layers": blocks}
    architecture = check_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(SEED)
    weight_map: dict[str, str] = {}
    parts = [_outer_shapes(architecture)]
    parts += [_layer_shapes(architecture, index) for index in range(blocks)]
    for number, shapes in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: _random(name, each, generator) for name, each in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _outer_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    sizes, fields = architecture.sizes, architecture.fields
    outer = architecture.family.outer_tensors(sizes, fields)
    return {architecture.embedding_name: (architecture.vocab, sizes.embedding), **outer}


def _layer_shapes(architecture: Architecture, index: int) -> dict[str, tuple[int, ...]]:
    prefix = f"{architecture.layer_name(index)}."
    others = architecture.family.layer_tensors(architecture.sizes, architecture.fields)
    shapes = {prefix + name: tuple(shape) for name, shape in others.items()}
    for linear in architecture.linears:
        if linear.name.startswith(prefix):
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.has_bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
    return shapes


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(prod(shape), generator=generator).view(shape)
    if len(shape) == 1 and name.endswith("weight"):
        return values.mul_(NORM_DEVIATION).add_(1).to(torch.bfloat16)
    return values.mul_(DEVIATION).to(torch.bfloat16)
