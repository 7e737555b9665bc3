"""Loading a checkpoint directory into a model that runs on its packed weights.

The directory is a stranger's: the config passes the same limits as a source model's, every shape
in the tensor headers is compared with what the config promises before any data is read, and no
tensor may be missing or left over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from engine.architecture import Architecture, check_config
from engine.checkpoint.format import QUANT_SUFFIXES, rotation_of_section, spec_of_section
from engine.errors import CheckpointInvalid
from engine.models.loading import build_empty_model, read_config
from engine.models.rotated import install_rotation
from engine.models.tensors import TensorFiles
from engine.modules.attention import round_queries
from engine.modules.linear import QuantLinear
from engine.modules.swap import prepare_model, quant_linears, swap_linears
from engine.rotation import Rotation, name_in_layer, online_blocks
from engine.spec import QuantSpec

__all__ = ["LoadedModel", "load_checkpoint", "make_skeleton", "tie_head"]

DTYPE_NAMES = {torch.int32: "I32", torch.float16: "F16", torch.uint8: "U8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory, ready to run."""

    model: nn.Module
    """The transformers causal language model, in evaluation mode, with quantized linears."""
    spec: QuantSpec
    architecture: Architecture
    rotation: Rotation = field(default_factory=Rotation.none)

    @property
    def memory_bytes(self) -> int:
        """What weights and the operands derived from them occupy."""
        tensors = {id(each): each for each in (*self.model.parameters(), *self.model.buffers())}
        derived = sum(each.operand_bytes for each in quant_linears(self.model).values())
        return sum(each.nbytes for each in tensors.values()) + derived


def load_checkpoint(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    prepares: bool = True,
) -> LoadedModel:
    """Load a directory that `write_checkpoint` made.

    Args:
        directory: the checkpoint.
        device: where the model runs.
        dtype: of activations, embeddings, norms and biases; packed tensors keep theirs.
        prepares: derive what the device multiplies with; for a model that is itself run.

    Raises:
        UnsupportedModel: naming the field of the config.
        CheckpointInvalid: naming the file or tensor that does not fit.
    """
    config = read_config(directory)
    spec = spec_of_section(config)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    architecture = check_config(plain)
    rotation = rotation_of_section(config, architecture)
    model = make_skeleton(plain, spec, architecture, rotation)
    expected = model.state_dict()
    if architecture.tied:
        del expected[architecture.head_name]
    files = TensorFiles.open(directory)
    _check_names(set(expected), set(files.file_of))
    for file in files.files:
        members = {name: expected[name] for name in expected if files.file_of[name] == file.name}
        found = _read_shard(file, members, dtype)
        model.load_state_dict(
            {name: tensor.to(device) for name, tensor in found.items()}, strict=False, assign=True
        )
    if architecture.tied:
        tie_head(model, architecture)
    model.to(device).requires_grad_(requires_grad=False).eval()
    if prepares:
        prepare_model(model)
    for index in range(architecture.layers):
        round_queries(model.get_submodule(architecture.layer_name(index)), spec.q_bits)
    return LoadedModel(model=model, spec=spec, architecture=architecture, rotation=rotation)


def make_skeleton(
    config: Mapping[str, Any], spec: QuantSpec, architecture: Architecture, rotation: Rotation
) -> nn.Module:
    """Make a model on the meta device with quantized linears and rotations in their places.

    Raises:
        CheckpointInvalid: if groups do not divide the inputs of a linear.
    """
    model = build_empty_model(config)
    install_rotation(model, architecture, rotation)
    quantizable = {each.name for each in architecture.linears}
    blocks = online_blocks(architecture, rotation)

    def quantized(name: str, linear: nn.Linear) -> QuantLinear | None:
        grid = spec.weight_grid(name) if name in quantizable else None
        if grid is None:
            return None
        if linear.in_features % grid.group_of(linear.in_features):
            raise CheckpointInvalid(
                f"{name}: group_size {grid.group_size} does not divide {linear.in_features}"
            )
        block = blocks.get(name_in_layer(architecture, name), 0)
        return QuantLinear.empty(linear, grid, spec.activation_bits(name), block)

    swap_linears(model, quantized)
    return model


def _check_names(expected: set[str], stored: set[str]) -> None:
    for name in sorted(expected - stored):
        raise CheckpointInvalid(f"the checkpoint lacks the tensor {name}")
    for name in sorted(stored - expected):
        raise CheckpointInvalid(f"the checkpoint holds {name}, which the model does not have")


def _read_shard(
    path: Path, expected: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as shard:
            for name, empty in expected.items():
                _check_header(name, shard.get_slice(name), empty)
            # a clone, so that nothing points into the map of a file that may be deleted
            tensors = {name: shard.get_tensor(name).clone() for name in expected}
    except (SafetensorError, OSError) as error:
        raise CheckpointInvalid(f"{path.name} is no readable shard: {error}") from error
    return {
        name: tensor if name.endswith(QUANT_SUFFIXES) else tensor.to(dtype)
        for name, tensor in tensors.items()
    }


def _check_header(name: str, header: Any, empty: torch.Tensor) -> None:
    shape = tuple(header.get_shape())
    if shape != tuple(empty.shape):
        raise CheckpointInvalid(
            f"{name} has shape {shape}, the config promises {tuple(empty.shape)}"
        )
    stored = str(header.get_dtype())
    if name.endswith(QUANT_SUFFIXES):
        if stored != DTYPE_NAMES[empty.dtype]:
            raise CheckpointInvalid(f"{name} is {stored} instead of {DTYPE_NAMES[empty.dtype]}")
    elif stored not in ("F32", "F16", "BF16"):
        raise CheckpointInvalid(f"{name} is {stored}, which is no weight's dtype")


def tie_head(model: nn.Module, architecture: Architecture) -> None:
    """Make the embedding the weight of the head."""
    embedding = model.get_parameter(architecture.embedding_name)
    head = model.get_submodule(architecture.family.head)
    head.register_parameter("weight", nn.Parameter(embedding, requires_grad=False))
