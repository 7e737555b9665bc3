"""A tiny model of every supported family, with random weights and a byte tokenizer."""

from dataclasses import dataclass, field

import torch
import transformers

from tests.tiny_llama import save_tiny_llama

SLIDING_WINDOW = 16
"""Shorter than the windows of the tests, so that it matters."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """What sets one tiny model apart from the others."""

    name: str
    config: str = ""
    fields: dict = field(default_factory=dict)
    renamed: dict = field(default_factory=dict)
    """What the class calls some of `SIZES`; None drops the size."""
    linears: int = 7
    """Of a layer."""
    attention: str = "sdpa"
    """What the class needs to compute what the model was trained with."""

    @property
    def config_class(self):
        return getattr(transformers, f"{self.config or self.name}Config")

    @property
    def model_class(self):
        return getattr(transformers, f"{self.name}ForCausalLM")

    def make_config(self, layers, fields):
        sizes = {"num_hidden_layers": layers, **SIZES}
        named = {self.renamed.get(name, name): value for name, value in sizes.items()}
        named.pop(None, None)
        return self.config_class(**{**named, **self.fields, **fields})


SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 256,
}
OPT_NAMES = {
    "intermediate_size": "ffn_dim",
    "num_key_value_heads": None,
    "initializer_range": "init_std",
}
FALCON_NAMES = {"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"}
GEMMA_FIELDS = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": SLIDING_WINDOW,
    "final_logit_softcapping": 5.0,
    "initializer_range": 0.05,
}
TINY = {
    "llama": Tiny(name="Llama", fields={"attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny(name="Mistral", fields={"sliding_window": SLIDING_WINDOW}),
    "qwen2": Tiny(
        name="Qwen2",
        fields={
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": Tiny(name="Qwen3", fields={"head_dim": 32, "tie_word_embeddings": True}),
    "opt": Tiny(name="OPT", renamed=OPT_NAMES, linears=6),
    "opt-350m": Tiny(
        name="OPT",
        fields={
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 32,
            "activation_function": "gelu",
        },
        renamed=OPT_NAMES,
        linears=6,
    ),
    "falcon-7b": Tiny(name="Falcon", renamed=FALCON_NAMES, linears=4),
    "falcon-40b": Tiny(
        name="Falcon",
        fields={"new_decoder_architecture": True},
        renamed=FALCON_NAMES,
        linears=4,
    ),
    "falcon-11b": Tiny(
        name="Falcon",
        fields={
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
        renamed=FALCON_NAMES,
        linears=4,
    ),
    "falcon-rw": Tiny(
        name="Falcon",
        fields={"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        renamed={**FALCON_NAMES, "num_key_value_heads": None},
        linears=4,
    ),
    "gemma2": Tiny(
        name="Gemma2",
        fields={**GEMMA_FIELDS, "attn_logit_softcapping": 2.0},
        attention="eager",
    ),
    "gemma3_text": Tiny(
        name="Gemma3",
        config="Gemma3Text",
        fields={**GEMMA_FIELDS, "sliding_window_pattern": 2},
    ),
    "phi3": Tiny(
        name="Phi3",
        fields={
            "pad_token_id": None,
            "sliding_window": SLIDING_WINDOW,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
        linears=4,
    ),
    "phi3-long": Tiny(
        name="Phi3",
        fields={
            "pad_token_id": None,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
            },
        },
        linears=4,
    ),
    "mixtral": Tiny(
        name="Mixtral",
        fields={"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
        linears=4 + 4 * 3,
    ),
}
FAMILIES = tuple(TINY)
"""Every family, and every layout of its layers."""


def save_tiny_model(folder, model_type="llama", *, layers=2, **fields):
    """Write a model directory; equal arguments write equal bytes."""
    save_tiny_llama(folder)
    model = make_tiny_model(model_type, layers=layers, **fields).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_tiny_model(model_type, *, layers=2, **fields):
    """Make a model with random weights, biases and norms."""
    tiny = TINY[model_type]
    torch.manual_seed(11)
    model = tiny.model_class(tiny.make_config(layers, fields))
    for name, parameter in model.named_parameters():
        # biases and norms start as constants, which would hide a mix-up
        if name.endswith("bias") or "norm" in name or ".ln_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def load_reference(folder, model_type):
    """Load a directory by the library alone, in full precision."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=TINY[model_type].attention
    ).eval()
