"""Turn a GGUF file into a clean full-precision model directory."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.architecture import check_config
from engine.errors import EngineError, UnsupportedModel
from engine.models.loading import build_empty_model

__all__ = ["import_gguf"]


def import_gguf(gguf_file: Path, out_dir: Path) -> None:
    """Dequantize a GGUF file to bfloat16 safetensors with tokenizer and chat template.

    The directory appears complete or not at all. Do this with files you trust: the tokenizer and
    the config come from the file's own metadata.

    Raises:
        UnsupportedModel: if the file does not exist or its architecture is not supported.
        EngineError: if the directory exists already.
    """
    if out_dir.exists():
        raise EngineError(f"{out_dir.name} exists already; name a new directory")
    if not gguf_file.is_file():
        raise UnsupportedModel("gguf_file", f"{gguf_file.name} does not exist")
    folder, name = str(gguf_file.parent), gguf_file.name
    fields = AutoConfig.from_pretrained(folder, gguf_file=name).to_dict()
    # a model that was loaded from GGUF counts as quantized and refuses to be saved
    fields.pop("quantization_config", None)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = _load_weights(gguf_file, fields)
    staging = out_dir.with_name(f".{out_dir.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    _generation_config(tokenizer).save_pretrained(staging)
    staging.replace(out_dir)


def _load_weights(gguf_file: Path, fields: dict[str, Any]) -> Any:
    architecture = check_config(fields)
    if architecture.family.experts is not None:
        raise UnsupportedModel("gguf_file", "experts in GGUF are not read; name its safetensors")
    model: Any = build_empty_model(fields)
    # the model's own loader for GGUF insists on the accelerate package; its reader does not
    load: Any = load_gguf_checkpoint
    tensors = load(str(gguf_file), return_tensors=True, model_to_load=model)
    weights = {name: each.to(torch.bfloat16) for name, each in tensors["tensors"].items()}
    if architecture.tied:
        weights.setdefault(architecture.head_name, weights[architecture.embedding_name])
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    return model


def _generation_config(tokenizer: Any) -> Any:
    config: Any = GenerationConfig
    return config(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
