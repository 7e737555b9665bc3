"""Decoder models of the supported families: built from checked sizes, loaded block by block.

No class of a repository is ever run and no config is handed to a loader: the config object is
built from the kept fields alone, and weights are assigned by name.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.architecture import Architecture, check_config, kept_fields
from engine.errors import CheckpointInvalid, UnsupportedModel
from engine.models.tensors import TensorFiles

__all__ = [
    "SourceModel",
    "build_empty_model",
    "build_model_config",
    "load_full_precision",
    "read_config",
]

MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_DEPTH = 20
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """A full-precision model on disk, of which one block at a time is in memory."""

    architecture: Architecture
    config: PretrainedConfig
    tensors: TensorFiles
    skeleton: nn.Module
    """The whole model without storage: on the meta device, apart from rotary frequencies."""
    dtype: torch.dtype

    @classmethod
    def open(cls, directory: Path, dtype: torch.dtype = torch.float32) -> Self:
        """Check config and tensor names; read no weight.

        Raises:
            UnsupportedModel: naming the field of the config.
            CheckpointInvalid: naming the tensor or file.
        """
        fields = read_config(directory)
        source = cls(
            architecture=check_config(fields),
            config=build_model_config(fields),
            tensors=TensorFiles.open(directory),
            skeleton=build_empty_model(fields),
            dtype=dtype,
        )
        for name in source.skeleton.state_dict():
            if name not in source.tensors.file_of and not source.is_tied(name):
                raise CheckpointInvalid(f"the model lacks the tensor {name}")
        return source

    def is_tied(self, name: str) -> bool:
        """Whether a tensor is the input embedding under another name."""
        return self.architecture.tied and name == HEAD

    def load_block(self, index: int) -> nn.Module:
        """Load decoder layer `index`, in evaluation mode and without gradients."""
        prefix = f"model.layers.{index}."
        block = copy.deepcopy(
            cast("nn.ModuleList", self.skeleton.get_submodule("model.layers"))[index]
        )
        names = {prefix + name: name for name in block.state_dict()}
        found = self.tensors.read(names, self.dtype)
        _assign(block, {short: found[name] for name, short in names.items()}, prefix)
        return block

    def load_embedding(self) -> torch.Tensor:
        """Load the input embedding ``[vocab, hidden]``."""
        return self.tensors.read([EMBEDDING], self.dtype)[EMBEDDING]

    def load_head(self) -> nn.Sequential:
        """Load the final norm and the output head: hidden states in, logits out."""
        norm = copy.deepcopy(self.skeleton.get_submodule("model.norm"))
        head = copy.deepcopy(self.skeleton.get_submodule("lm_head"))
        weight = EMBEDDING if self.architecture.tied else HEAD
        found = self.tensors.read([NORM, weight], self.dtype)
        _assign(norm, {"weight": found[NORM]}, "model.norm.")
        _assign(head, {"weight": found[weight]}, "lm_head.")
        return nn.Sequential(norm, head)


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a model directory.

    Raises:
        UnsupportedModel: if it is missing, larger than 1 MB, nested deeper than 20, or no object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UnsupportedModel("config.json", "the model has no config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UnsupportedModel(
            "config.json", f"config.json is larger than {MAX_CONFIG_BYTES} bytes"
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel("config.json", "config.json is no valid JSON") from error
    if not isinstance(config, dict) or _is_deeper(config, MAX_CONFIG_DEPTH):
        raise UnsupportedModel(
            "config.json", f"config.json must be an object nested at most {MAX_CONFIG_DEPTH} deep"
        )
    return config


def build_model_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """Build the config object from the kept fields alone; attention is sdpa.

    Raises:
        UnsupportedModel: naming the field.
    """
    fields = kept_fields(config)
    classes: dict[str, type[PretrainedConfig]] = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
    }
    try:
        built = classes[fields.pop("model_type")](**copy.deepcopy(fields))
    except (ValueError, TypeError, KeyError) as error:
        raise UnsupportedModel("config.json", f"the config is not consistent: {error}") from error
    built._attn_implementation = "sdpa"  # noqa: SLF001  # the only switch that both 5.17 and 5.23 have
    return built


def build_empty_model(config: Mapping[str, Any]) -> nn.Module:
    """Build the causal language model on the meta device; rotary frequencies are real.

    Raises:
        UnsupportedModel: naming the field.
    """
    classes: dict[str, Any] = {
        "llama": LlamaForCausalLM,
        "mistral": MistralForCausalLM,
        "qwen2": Qwen2ForCausalLM,
        "qwen3": Qwen3ForCausalLM,
    }
    built = build_model_config(config)
    with torch.device("meta"):
        model: nn.Module = classes[built.model_type](built)
    # frequencies are computed by the constructor, not stored in files
    stack = model.get_submodule("model")
    stack.rotary_emb = type(stack.get_submodule("rotary_emb"))(config=built)
    return model.requires_grad_(requires_grad=False).eval()


def load_full_precision(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a whole model.

    Raises:
        UnsupportedModel: naming the field of the config.
        CheckpointInvalid: naming the missing or misshapen tensor.
    """
    source = SourceModel.open(directory, dtype)
    names = [name for name in source.skeleton.state_dict() if not source.is_tied(name)]
    found = source.tensors.read(names, dtype)
    if source.architecture.tied:
        found[HEAD] = found[EMBEDDING]
    _assign(source.skeleton, found, "")
    return source.skeleton


def _assign(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    for name, empty in module.state_dict().items():
        if tensors[name].shape != empty.shape:
            raise CheckpointInvalid(
                f"{prefix}{name} has shape {tuple(tensors[name].shape)},"
                f" the config promises {tuple(empty.shape)}"
            )
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(requires_grad=False).eval()


def _is_deeper(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(each, depth - 1) for each in children)
