"""A tiny model of every supported family, with random weights and a byte tokenizer."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny_llama import save_tiny_llama

SLIDING_WINDOW = 16
"""Shorter than the windows of the tests, so that it matters."""
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": SLIDING_WINDOW}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
}
FAMILIES = tuple(CLASSES)


def save_tiny_model(folder, model_type="llama", *, layers=2, **fields):
    """Write a model directory; equal arguments write equal bytes."""
    save_tiny_llama(folder)
    config_class, model_class, extra = CLASSES[model_type]
    torch.manual_seed(11)
    config = config_class(
        **{
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": 256,
            **extra,
            **fields,
        }
    )
    model = model_class(config).to(torch.bfloat16)
    # biases and norms start as constants, which would hide a mix-up
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
