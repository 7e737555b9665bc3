"""The divergence from the full-precision logits, over the whole vocabulary, chunk by chunk.

    D = mean over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v)

p is what the head makes of the full-precision chain's last hidden states, q what it makes of the
quantized model's. Logits of one chunk are in memory at a time; backward computes them again.

Shape legend: T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["logit_divergence"]

CHUNK = 2048
"""Tokens whose logits are in memory at once."""


def logit_divergence(
    seen: torch.Tensor, wanted: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Compare last hidden states through the head: a scalar, differentiable in `seen`.

    Args:
        seen: float ``[..., H]`` of the quantized model.
        wanted: float ``[..., H]`` of the full-precision model.
        head: final norm and output head.
    """
    seen, wanted = seen.flatten(0, -2), wanted.flatten(0, -2)
    total = seen.new_zeros(())
    for start in range(0, len(seen), CHUNK):
        part = slice(start, start + CHUNK)
        total = total + checkpoint(
            _chunk_divergence,
            seen[part],
            wanted[part],
            head,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / len(seen)


def _chunk_divergence(
    seen_TH: torch.Tensor,
    wanted_TH: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    with torch.no_grad():
        full_TV = torch.log_softmax(head(wanted_TH).float(), dim=-1)
    quant_TV = torch.log_softmax(head(seen_TH).float(), dim=-1)
    return torch.nn.functional.kl_div(quant_TV, full_TV, log_target=True, reduction="sum")
