"""Perplexity over windows without overlap, the GPTQ protocol, in the model's own precision.

    ppl = exp( sum over windows and t < T - 1 of -log p(token[t+1] | token[<=t]) / (W (T - 1)) )

Every window starts from an empty context. The model runs block by block over all windows, so
that of a model on disk one block is in memory.

Shape legend: W windows, T tokens, H hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from engine.calibration.capture import capture_inputs
from engine.calibration.watch import Watch
from engine.events import Stage
from engine.models.blocks import BlockModel
from engine.spec import FULL_BITS

__all__ = ["Perplexity", "measure_perplexity"]

HEAD_CHUNK = 512
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """One measurement."""

    value: float
    tokens: int
    """Tokens that were predicted."""


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
        ValueError: if a probability is not finite.
    """
    inputs = capture_inputs(model, tokens, device)
    hidden = inputs.hidden
    steps = len(inputs.calls) * len(hidden)
    for index, call in enumerate(inputs.calls):
        block = model.load_block(index).to(device)
        for window in range(len(hidden)):
            watch.check()
            hidden[window] = call.run(block, hidden[window : window + 1], kv_bits)[0]
            done = index * len(hidden) + window + 1
            watch.progress(Stage.EVALUATING, done, steps, "block")
    head = model.load_head().to(device)
    losses = [_window_loss(head, hidden[i], tokens[i].to(device)) for i in range(len(hidden))]
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    mean = math.fsum(losses) / predicted
    if not math.isfinite(mean):
        raise ValueError("the model gives probabilities that are not finite")
    return Perplexity(value=math.exp(mean), tokens=predicted)


def _window_loss(head: nn.Module, hidden_TH: torch.Tensor, tokens_T: torch.Tensor) -> float:  # noqa: N803  shape suffixes
    """Sum of the negative log-likelihoods of a window."""
    total = 0.0
    for start in range(0, len(tokens_T) - 1, HEAD_CHUNK):
        targets = tokens_T[start + 1 : start + 1 + HEAD_CHUNK]
        logits = head(hidden_TH[start : start + len(targets)])
        total += float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return total
