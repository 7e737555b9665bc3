"""Decoder models of the supported families: built from checked sizes, loaded block by block.

No class of a repository is ever run and no config is handed to a loader: the config object is
built from the kept fields alone, and weights are assigned by name.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from engine.architecture import Architecture, check_config
from engine.errors import CheckpointInvalid, UnsupportedModel
from engine.models.adapt import adapt_model, fill_buffers
from engine.models.parts import join_exit
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
WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """A full-precision model on disk, of which one block at a time is in memory."""

    architecture: Architecture
    config: PretrainedConfig
    tensors: TensorFiles
    skeleton: nn.Module
    """The whole model without storage: on the meta device, apart from rotary frequencies."""
    dtype: torch.dtype
    block_device: torch.device | None = None
    """Where blocks are loaded to; None is main memory."""

    @classmethod
    def open(cls, directory: Path, dtype: torch.dtype = torch.float32) -> Self:
        """Check config and the names, shapes and dtypes of the tensors; read no weight.

        Raises:
            UnsupportedModel: naming the field of the config.
            CheckpointInvalid: naming the tensor or file.
        """
        config = read_config(directory)
        architecture = check_config(config)
        skeleton = build_empty_model(config)
        return cls(
            architecture=architecture,
            config=build_model_config(config),
            tensors=_find_tensors(architecture, skeleton, TensorFiles.open(directory)),
            skeleton=skeleton,
            dtype=dtype,
        )

    def is_tied(self, name: str) -> bool:
        """Whether a tensor is the input embedding under another name."""
        return self.architecture.tied and name == self.architecture.head_name

    def load_block(self, index: int) -> nn.Module:
        """Load decoder layer `index`, in evaluation mode and without gradients."""
        return self._load(self.architecture.layer_name(index), self.block_device)

    def load_embedding(self) -> torch.Tensor:
        """Load the input embedding ``[vocab, hidden]``."""
        name = self.architecture.embedding_name
        return self.tensors.read([name], self.dtype)[name]

    def load_part(self, name: str) -> nn.Module:
        """Load one module by its full name, in evaluation mode and without gradients."""
        return self._load(name, None)

    def load_head(self) -> nn.Sequential:
        """Load final norm and output head: hidden states in, logits out."""
        return join_exit(self.skeleton, self.architecture.family, self.load_part)

    def _load(self, name: str, device: torch.device | None) -> nn.Module:
        part = copy.deepcopy(self.skeleton.get_submodule(name))
        prefix = f"{name}."
        # a tied head is the embedding
        stored = {
            short: self.architecture.embedding_name
            if self.is_tied(prefix + short)
            else prefix + short
            for short in part.state_dict()
        }
        found = self.tensors.read(stored.values(), self.dtype, device)
        _assign(part, {short: found[full] for short, full in stored.items()}, prefix)
        return part


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a model directory.

    Raises:
        UnsupportedModel: if it is missing, larger than 1 MB, nested deeper than 20, or no object,
            or naming the field that holds NaN or infinity, which is no JSON.
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
    field = _find_non_finite(config)
    if field is not None:
        raise UnsupportedModel(field, f"{field} of config.json is no finite number; write one")
    return config


def build_model_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """Build the config object from the kept fields alone; attention is sdpa.

    Raises:
        UnsupportedModel: naming the field.
    """
    architecture = check_config(config)
    family, fields = architecture.family, dict(architecture.fields)
    del fields["model_type"]
    try:
        built: PretrainedConfig = getattr(transformers, family.config_class)(
            # nothing is ever padded, and an id beyond the vocabulary would break the embedding
            **copy.deepcopy(fields),
            pad_token_id=None,
        )
    except Exception as error:  # the library has classes of its own for a value of a wrong type
        raise UnsupportedModel("config.json", f"the config is not consistent: {error}") from error
    built._attn_implementation = family.attention  # noqa: SLF001  the only switch that both 5.17 and 5.23 have
    return built


def build_empty_model(config: Mapping[str, Any]) -> nn.Module:
    """Build the causal language model on the meta device; buffers that no file holds are real.

    Raises:
        UnsupportedModel: naming the field.
    """
    architecture, built = check_config(config), build_model_config(config)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, architecture.family.model_class)(built)
        adapt_model(model, architecture)
    fill_buffers(model, built, architecture)
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
        found[source.architecture.head_name] = found[source.architecture.embedding_name]
    _assign(source.skeleton, found, "")
    return source.skeleton


def _find_tensors(
    architecture: Architecture, skeleton: nn.Module, files: TensorFiles
) -> TensorFiles:
    """Find every tensor of the model in the files, and check its header, before any is read."""
    parts, shapes = {}, {}
    for name, empty in skeleton.state_dict().items():
        if architecture.tied and name == architecture.head_name:
            continue
        part = architecture.find_stored(name, files.file_of)
        if part is None:
            raise CheckpointInvalid(f"the model lacks the tensor {name}")
        if part.tensor != name:
            parts[name] = part
        shapes[name] = tuple(empty.shape)
    found = files.with_parts(parts)
    for header in found.headers(shapes):
        _check_shape(header.name, header.shape, shapes[header.name])
        # integers and eight-bit floats would need a scale that nothing here knows
        if header.dtype not in WEIGHT_DTYPES:
            raise CheckpointInvalid(
                f"{header.name} is {header.dtype}; store it as one of {', '.join(WEIGHT_DTYPES)}"
            )
    return found


def _assign(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    for name, empty in module.state_dict().items():
        _check_shape(f"{prefix}{name}", tuple(tensors[name].shape), tuple(empty.shape))
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(requires_grad=False).eval()


def _check_shape(name: str, shape: tuple[int, ...], promised: tuple[int, ...]) -> None:
    if shape != promised:
        raise CheckpointInvalid(f"{name} has shape {shape}, the config promises {promised}")


def _find_non_finite(value: object) -> str | None:
    """Find the first number of a parsed JSON that is not finite: `a.b.0`, or "" for itself."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    if not isinstance(value, dict | list):
        return None
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        found = _find_non_finite(each)
        if found is not None:
            return f"{key}.{found}".rstrip(".")
    return None


def _is_deeper(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(each, depth - 1) for each in children)
