"""Source models for tests of the service: real configs and safetensors, random weights."""

import json

import numpy as np

from engine.architecture import check_config
from engine.families.registry import FAMILIES

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
CONFIGS = {
    **{name: CONFIG | {"model_type": name} for name in FAMILIES},
    "opt": CONFIG | {"model_type": "opt", "ffn_dim": 128},
    "mixtral": CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""One of every supported type."""
DTYPE_BYTES = {"BF16": 2, "F32": 4, "I8": 1}


def tensor_shapes(config):
    """Names and shapes of all tensors of a model."""
    architecture = check_config(config)
    family, sizes, fields = architecture.family, architecture.sizes, architecture.fields
    shapes = {architecture.embedding_name: [architecture.vocab, sizes.embedding]}
    for name, shape in family.outer_tensors(sizes, fields).items():
        shapes[name] = list(shape)
    for layer in range(architecture.layers):
        for name, shape in family.layer_tensors(sizes, fields).items():
            shapes[f"{architecture.layer_name(layer)}.{name}"] = list(shape)
    for linear in architecture.linears:
        shapes[f"{linear.name}.weight"] = [linear.out_features, linear.in_features]
        if linear.has_bias:
            shapes[f"{linear.name}.bias"] = [linear.out_features]
    return shapes


def safetensors_header(shapes, dtype="BF16"):
    """Length and JSON of a header, and the size of the data behind it."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + DTYPE_BYTES[dtype] * _product(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw, end


def safetensors_bytes(shapes, dtype="BF16"):
    header, data_bytes = safetensors_header(shapes, dtype)
    return header + np.random.default_rng(0).bytes(data_bytes)


def model_files(config=CONFIG, *, shards=1, **others):
    """Files of a model; keywords replace or add files, dots of a name written as `__`."""
    shapes = tensor_shapes(config)
    files = {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "LICENSE": b"Apache License 2.0",
        "README.md": b"# source",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04pickle",
        "consolidated.safetensors": b"a second copy",
    }
    if shards == 1:
        files["model.safetensors"] = safetensors_bytes(shapes)
    else:
        files |= _sharded(shapes, shards)
    return files | {name.replace("__", "."): content for name, content in others.items()}


def _sharded(shapes, count):
    files, weight_map, names = {}, {}, sorted(shapes)
    for index in range(count):
        path = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        held = names[index::count]
        files[path] = safetensors_bytes({name: shapes[name] for name in held})
        weight_map |= dict.fromkeys(held, path)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


def _product(shape):
    count = 1
    for size in shape:
        count *= size
    return count
