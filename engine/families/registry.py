"""Every supported family, by the `model_type` of a config."""

from engine.families.base import Family
from engine.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Family] = {each.model_type: each for each in (LLAMA, MISTRAL, QWEN2, QWEN3)}
