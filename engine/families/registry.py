"""Every supported family, by the `model_type` of a config."""

from engine.families.base import Family
from engine.families.falcon import FALCON
from engine.families.gemma import GEMMA2, GEMMA3_TEXT
from engine.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from engine.families.mixtral import MIXTRAL
from engine.families.opt import OPT
from engine.families.phi3 import PHI3

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Family] = {
    each.model_type: each
    for each in (
        LLAMA, MISTRAL, QWEN2, QWEN3, OPT, FALCON, GEMMA2, GEMMA3_TEXT, PHI3, MIXTRAL,
    )
}  # fmt: skip
