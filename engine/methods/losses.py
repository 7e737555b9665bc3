"""What a wrong block output is worth.

    error      E = mean over tokens of weight_t |seen_t - wanted_t|^2 / H
    cosine     C = -log |mean over tokens of cos(seen_t, wanted_t)|            (ABQ-LLM eq. 2, DLC)
    loss       E(wanted) + own E(own) + cosine (C(wanted) + C(own))

`own` is the full-precision block's output on the quantized chain's inputs (OmniQuant's `aug_loss`);
equation 2 has both cosines, whatever the weight of E(own).
The maps' divergence (ABQ-LLM eq. 4, as written in the paper) takes, for every head and query, both
rows as distributions p (full precision) and q,

    A = mean over heads and queries of [ KL(p || q) + KL(q || p) ]

from masked log-probabilities; a symmetric sum is (p - q) (log p - log q).

A few tokens of a model carry activations a thousand times larger than all others (the first of a
window, mostly); a plain mean square is theirs alone. `token_weights` divides a token's error by its
own power where that is above the median token's.

Shape legend: B windows, T tokens, H hidden size, A heads, D dimensions of a head.
"""

import torch
from torch import nn

from engine.methods.base import BlockOutputs

__all__ = ["BlockLoss", "map_divergence", "token_weights"]


class BlockLoss:
    """The weighted sum of the errors of a block's output, after the residual."""

    def __init__(self, *, own: float = 0.0, cosine: float = 0.0) -> None:
        self._own, self._cosine = own, cosine
        self.needs_own = own > 0 or cosine > 0

    def __call__(self, outputs: BlockOutputs) -> torch.Tensor:
        """Compare ``[B, T, H]`` outputs; the result is a scalar."""
        weight = outputs.token_weight
        loss = _square_error(outputs.seen, outputs.wanted, weight)
        if self._cosine:
            loss = loss + self._cosine * _cosine_error(outputs.seen, outputs.wanted)
        if self._own:
            loss = loss + self._own * _square_error(outputs.seen, _own(outputs), weight)
        if self._cosine:
            loss = loss + self._cosine * _cosine_error(outputs.seen, _own(outputs))
        return loss


@torch.no_grad()
def token_weights(wanted: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Weigh tokens so that none counts by more than the median token's power.

    Args:
        wanted: float ``[W, T, H]``, on any device, or on disk.
        device: where the weights are computed; None takes that of `wanted`.

    Returns:
        float32 ``[W, T, 1]``: ``median power / max(power, median power)``.
    """
    power = torch.stack(
        [window.to(device).float().square().mean(-1, keepdim=True) for window in wanted]
    )
    median = power.median()
    return median / power.clamp(min=median.clamp(min=torch.finfo(torch.float32).tiny))


def map_divergence(
    full_log_p: torch.Tensor, quant_log_p: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Symmetric divergence of attention maps: a scalar.

    Args:
        full_log_p: float32 ``[B, A, T, T]`` log-probabilities; anything where masked.
        quant_log_p: as `full_log_p`; takes the gradient.
        mask: bool ``[T, T]``, true where a query may look.
    """
    difference = (full_log_p.exp() - quant_log_p.exp()) * (full_log_p - quant_log_p)
    return difference.masked_fill(~mask, 0.0).sum(-1).mean()


def _own(outputs: BlockOutputs) -> torch.Tensor:
    assert outputs.own is not None, "a loss that needs_own gets it"
    return outputs.own


def _square_error(
    seen: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    error = (seen.float() - wanted).square()
    return error.mean() if weight is None else (error * weight).mean()


def _cosine_error(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    cosine = nn.functional.cosine_similarity(seen.float(), wanted.float(), dim=-1)
    return -torch.log(cosine.mean().abs().clamp(min=1e-6))
