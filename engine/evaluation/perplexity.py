"""Perplexity over windows without overlap, the GPTQ protocol, in the model's own precision.

    ppl = exp( sum over windows and t < T - 1 of -log p(token[t+1] | token[<=t]) / (W (T - 1)) )

Every window starts from an empty context. The model runs block by block over all windows, so
that of a model on disk one block is in memory.

Shape legend: W windows, T tokens, H hidden size.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from engine.calibration.watch import Watch
from engine.evaluation.chain import Chain
from engine.events import Stage
from engine.models.blocks import BlockModel
from engine.spec import FULL_BITS

__all__ = ["Perplexity", "count_steps", "measure_perplexity"]

HEAD_CHUNK = 512
"""Tokens whose logits are in memory at once."""
MAX_MEAN_LOSS = math.log(sys.float_info.max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """One measurement."""

    value: float
    tokens: int
    """Tokens that were predicted."""

    @classmethod
    def of_losses(cls, losses: Iterable[float], tokens: int) -> Self:
        """Relate sums of negative log-likelihoods to the tokens they stand for.

        Raises:
            ValueError: if a probability is not finite, or the perplexity.
        """
        mean = math.fsum(losses) / tokens
        if not math.isfinite(mean):
            raise ValueError("the model gives probabilities that are not finite")
        if mean > MAX_MEAN_LOSS:
            raise ValueError(f"the perplexity is not finite: {mean:.0f} nats a token")
        return cls(value=math.exp(mean), tokens=tokens)


@torch.no_grad()
def measure_perplexity(
    model: BlockModel,
    tokens: torch.Tensor,
    watch: Watch,
    *,
    kv_bits: int = FULL_BITS,
    device: torch.device | str = "cpu",
) -> Perplexity:
    """Measure perplexity.

    Args:
        model: any model in blocks.
        tokens: int64 ``[W, T]``, T at least 2.
        watch: told the progress, asked whether to go on.
        kv_bits: what keys and values are rounded to.
        device: where it runs.

    Raises:
        CalibrationInterrupted: if the watch says to stop.
        ValueError: if a probability is not finite, or the perplexity.
    """
    watch.check()
    chain = Chain.start(model, tokens, kv_bits=kv_bits, device=device)
    on_windows = count_steps(watch, chain.steps)
    for index in range(len(chain.calls)):
        chain.advance(index, on_windows)
    head = chain.load_head()
    losses = [
        _window_loss(head, hidden, window.to(device))
        for hidden, window in zip(chain.hidden, tokens, strict=True)
    ]
    return Perplexity.of_losses(losses, tokens.shape[0] * (tokens.shape[1] - 1))


def count_steps(watch: Watch, steps: int) -> Callable[[int], None]:
    """Make a counter of windows: each call reports some more and asks whether to go on."""
    done = 0

    def count(windows: int) -> None:
        nonlocal done
        done += windows
        watch.progress(Stage.EVALUATING, done, steps, "block")
        watch.check()

    return count


def _window_loss(head: nn.Module, hidden_TH: torch.Tensor, tokens_T: torch.Tensor) -> float:  # noqa: N803  shape suffixes
    """Sum of the negative log-likelihoods of a window."""
    total = 0.0
    for start in range(0, len(tokens_T) - 1, HEAD_CHUNK):
        targets = tokens_T[start + 1 : start + 1 + HEAD_CHUNK]
        logits = head(hidden_TH[start : start + len(targets)])
        total += float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return total
