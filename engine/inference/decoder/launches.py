"""How the kernels of a decoder are launched: chosen once for every shape, not at every launch.

A launch takes the GPU some microseconds; where hundreds follow each other, the host must not take
longer for each.
"""

from dataclasses import replace
from functools import lru_cache

from kernels import kv_append, paged_prefill, quantize_tokens

__all__ = ["append_config", "prefill_config", "row_config"]


@lru_cache(maxsize=4096)
def row_config(
    columns: int, tokens: int, *, gated: bool, overlaps: bool
) -> quantize_tokens.LaunchConfig:
    """For rows of features.

    Args:
        columns: the most that a row has, of what is read and what is written.
        tokens: M.
        gated: whether they are gated, by parts where there are few.
        overlaps: whether kernels may start while others still run.
    """
    block = quantize_tokens.row_block(columns)
    chosen = quantize_tokens.select_config(block, m=tokens, gated=gated)
    return replace(chosen, launch_pdl=chosen.launch_pdl and overlaps)


@lru_cache(maxsize=4096)
def append_config(tokens: int, kv_heads: int, *, overlaps: bool) -> kv_append.LaunchConfig:
    """For keys and values that enter the pages."""
    return replace(kv_append.select_config(tokens, kv_heads), launch_pdl=overlaps)


@lru_cache(maxsize=4096)
def prefill_config(
    tokens: int, group: int, head_dim: int, *, overlaps: bool
) -> paged_prefill.LaunchConfig:
    """For the attention of chunks; `group` is query heads for each of keys."""
    return replace(paged_prefill.select_config(tokens, group, head_dim), pdl=overlaps)
