"""Quantized models of published sizes with random codes, made on the device that runs them.

Codes are drawn as the bit-planes of a checkpoint, a few gigabytes at most, and never as floats, so
a model of 8 billion weights takes seconds. Scales give weights the deviation that real ones have;
texts mean nothing, times and bytes do.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.shapes import SHAPES
from engine.architecture import check_config
from engine.checkpoint.reader import LoadedModel, make_skeleton, tie_head
from engine.modules.linear import QuantLinear
from engine.rotation import Rotation
from engine.spec import QuantSpec

__all__ = ["make_random_model", "real_config"]

VOCABULARIES = {
    "llama-7b": 32000,
    "llama-13b": 32000,
    "llama-3-8b": 128256,
    "llama-70b": 32000,
    "qwen2.5-7b": 152064,
    "smollm2-135m": 49152,
}
TIED = ("smollm2-135m", "tiny", "toy")
OTHERS: Mapping[str, Mapping[str, Any]] = {
    # heads as wide as the kernels of a GPU read them
    "toy": {**SHAPES["tiny"], "hidden_size": 128, "num_attention_heads": 2,
            "num_key_value_heads": 1},
    "llama-3-8b": {**SHAPES["llama-3-8b"], "max_position_embeddings": 8192},
}  # fmt: skip
DEVIATION = 0.02


def real_config(shape: str) -> dict[str, Any]:
    """The config of a published model, its own vocabulary included; `toy` is nobody's."""
    config = dict(OTHERS.get(shape) or SHAPES[shape])
    vocabulary = VOCABULARIES.get(shape, config["vocab_size"])
    return config | {"vocab_size": vocabulary, "tie_word_embeddings": shape in TIED}


def make_random_model(
    shape: str, spec: QuantSpec, device: torch.device, dtype: torch.dtype, seed: int = 7
) -> LoadedModel:
    """Make a model as `engine.checkpoint.reader.load_checkpoint` gives it, not prepared.

    Args:
        shape: one of `SHAPES`, or `toy`.
        spec: bits of its linears, and the rotations that its recipe asks for.
        device: where the weights come to life.
        dtype: of embeddings, norms and biases.
        seed: equal seeds give equal models on one device.
    """
    config = real_config(shape)
    architecture = check_config(config)
    rotation = Rotation.of(spec, architecture)
    model = make_skeleton(config, spec, architecture, rotation)
    grids = {name: each for name, each in model.named_modules() if isinstance(each, QuantLinear)}
    generator = torch.Generator(device).manual_seed(seed)
    tensors = dict(_draw_tensors(model, grids, dtype, generator))
    if architecture.tied:
        tensors[architecture.head_name] = tensors[architecture.embedding_name]
    model.load_state_dict(tensors, assign=True)
    if architecture.tied:
        tie_head(model, architecture)
    model.to(device).requires_grad_(requires_grad=False).eval()
    return LoadedModel(model=model, spec=spec, architecture=architecture, rotation=rotation)


def _draw_tensors(
    model: nn.Module,
    grids: Mapping[str, QuantLinear],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, empty in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        if owner in grids and part != "bias":
            yield name, _draw_part(part, empty, grids[owner], generator)
        elif empty.dim() > 1:
            values = torch.empty(empty.shape, dtype=dtype, device=generator.device)
            yield name, values.normal_(0, DEVIATION, generator=generator)
        else:
            fill = torch.zeros if part == "bias" else torch.ones
            yield name, fill(empty.shape, dtype=dtype, device=generator.device)


def _draw_part(
    part: str, empty: torch.Tensor, linear: QuantLinear, generator: torch.Generator
) -> torch.Tensor:
    """One tensor of a quantized linear; all codes that its planes can spell are as likely."""
    device, planes = generator.device, linear.grid.planes
    if part == "weight_packed":
        words = torch.empty(empty.shape, dtype=torch.int32, device=device)
        return words.random_(-(2**31), 2**31 - 1, generator=generator)
    if part == "weight_scale":
        deviation = (4**planes / 12) ** 0.5
        return torch.full(empty.shape, DEVIATION / deviation, dtype=empty.dtype, device=device)
    return torch.full(empty.shape, 2 ** (planes - 1), dtype=empty.dtype, device=device)
