"""transformers in bfloat16 on the same shapes: random weights, a static cache, compiled.

Compilation takes a minute or two, so it is asked for by name.
"""

import time
from typing import Any

import torch
import transformers

from benchmarks.decode_case import DecodeCase
from benchmarks.random_model import real_config
from engine.architecture import check_config
from engine.models.loading import build_model_config

__all__ = ["measure_rival"]

WARM_UPS = 2
"""One compiles, one captures."""


@torch.inference_mode()
def measure_rival(case: DecodeCase, device: torch.device) -> dict[str, Any]:
    """Time `generate` for a prompt of one sequence; returns a row.

    Args:
        case: its shape, context and new tokens count.
        device: where; on a CPU nothing is compiled.
    """
    config = real_config(case.shape)
    family = check_config(config).family
    torch.manual_seed(7)
    with torch.device(device):
        model = getattr(transformers, family.model_class)(build_model_config(config))
    model = model.to(torch.bfloat16).eval()
    prompt = torch.arange(case.context, device=device).unsqueeze(0) % config["vocab_size"]
    options = {
        "max_new_tokens": case.new_tokens,
        "min_new_tokens": case.new_tokens,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": device.type == "cpu",
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    seconds = 0.0
    for _ in range(WARM_UPS + 1):
        started_s = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started_s
    weight_bytes = sum(each.nbytes for each in model.parameters())
    return {
        "engine": "transformers static cache + compile",
        "shape": case.shape,
        "config": "bf16",
        "kv_bits": 16,
        "head_bits": None,
        "phase": case.phase.value,
        "batch": 1,
        "context": case.context,
        "tokens_per_s": round(case.new_tokens / seconds, 1),
        "ms_per_step": round(seconds / case.new_tokens * 1e3, 4),
        "bound_ms": None,
        "weight_gb": round(weight_bytes / 1e9, 3),
        "graph_gb": None,
        "goal": None,
        "split": None,
    }
