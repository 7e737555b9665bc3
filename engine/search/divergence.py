"""How far a perturbed model's predictions are from those of full precision.

    KL(p || q) = sum_v p_v (log p_v - log q_v) = sum_v p_v (exp(d_v) - 1 - d_v)
    d_v = log q_v - log p_v

Both sums are equal because p and q each sum to one. No term of the second is negative and all of
them are small where d is, so float32 keeps divergences that the first would lose in rounding.

Shape legend: W windows, T tokens, H hidden size, V tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

__all__ = ["divergences", "relative_error"]

MIN_SQUARE = 1e-30


@torch.no_grad()
def divergences(
    head: nn.Module,
    wanted: torch.Tensor,
    perturbed: Sequence[torch.Tensor],
    *,
    check: Callable[[], None],
) -> list[float]:
    """Measure the KL divergence of the logits, in nats per token.

    Args:
        head: hidden states in, logits out.
        wanted: ``[W, T, H]`` after the last block, in full precision.
        perturbed: the same of perturbed models.
        check: called before each head; may raise.
    """
    sums: list[list[float]] = [[] for _ in perturbed]
    for window in range(len(wanted)):
        log_p_TV = torch.log_softmax(head(wanted[window]).float(), -1)  # noqa: N806  shape suffix
        p_TV = log_p_TV.exp()  # noqa: N806  shape suffix
        for each, hidden in zip(sums, perturbed, strict=True):
            check()
            log_q_TV = torch.log_softmax(head(hidden[window]).float(), -1)  # noqa: N806  shape suffix
            d_TV = log_q_TV - log_p_TV  # noqa: N806  shape suffix
            small_TV = p_TV * (torch.expm1(d_TV) - d_TV)  # noqa: N806  shape suffix
            # where d is large nothing cancels, and p exp(d) may be zero times infinity
            large_TV = log_q_TV.exp() - p_TV * (1 + d_TV)  # noqa: N806  shape suffix
            each.append(float(torch.where(d_TV > 1, large_TV, small_TV).sum(-1).mean()))
    return [math.fsum(each) / len(wanted) for each in sums]


@torch.no_grad()
def relative_error(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean over tokens of |seen - wanted|^2 / |wanted|^2; both ``[W, T, H]``.

    Every block begins with a norm, so the size of an error counts against its own token's.
    """
    error_WT = (seen - wanted).float().square().sum(-1)  # noqa: N806  shape suffix
    size_WT = wanted.float().square().sum(-1).clamp(min=MIN_SQUARE)  # noqa: N806  shape suffix
    return float((error_WT / size_WT).mean())
