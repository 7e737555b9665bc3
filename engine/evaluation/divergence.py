"""Source and result side by side: perplexity of both, divergence of a token, error of a layer.

    KL[t] = sum over v of p[t, v] (log p[t, v] - log q[t, v])        p the source, q the result
    top-1 agreement = share of t with argmax p[t] = argmax q[t]
    error[k] = sum |y_q[k] - y_p[k]|^2 / sum |y_p[k]|^2              y the output of decoder layer k

Both models run block by block over the same windows, each from its own inputs; probabilities are
those of every token that the perplexity predicts. Logits are in memory for a chunk of tokens,
logarithms are taken in float32.

Shape legend: W windows, T tokens, H hidden size, C tokens of a chunk, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from engine.calibration.watch import Watch
from engine.checkpoint.evaluation import Divergence
from engine.evaluation.chain import Chain
from engine.evaluation.perplexity import Perplexity, count_steps

__all__ = ["Comparison", "as_it_is", "compare_chains"]

HEAD_CHUNK = 256
"""Tokens whose logits of both models are in memory at once."""
PERCENTILE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models over the same windows."""

    fp: Perplexity
    quant: Perplexity
    divergence: Divergence
    layer_errors: tuple[float, ...]
    """Relative mean square error at the output of every decoder layer."""


def as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    """Take the result's hidden states for what they are: both models use the same basis."""
    return hidden


@torch.no_grad()
def compare_chains(
    source: Chain,
    result: Chain,
    tokens: torch.Tensor,
    watch: Watch,
    to_source_basis: Callable[[torch.Tensor], torch.Tensor] = as_it_is,
) -> Comparison:
    """Run two chains that have just started and compare what comes out.

    Args:
        source: the full-precision model.
        result: the quantized one.
        tokens: int64 ``[W, T]``, T at least 2, the windows that both chains started from.
        watch: told the progress, asked whether to go on.
        to_source_basis: turns the result's ``[T, H]`` hidden states into the source's basis; a
            result whose residual stream is rotated is rotated back here.

    Raises:
        CalibrationInterrupted: if the watch says to stop.
        ValueError: if a probability, a perplexity or a layer's output is not finite.
    """
    watch.check()
    on_windows = count_steps(watch, source.steps + result.steps)
    errors = []
    for index in range(len(source.calls)):
        source.advance(index, on_windows)
        result.advance(index, on_windows)
        errors.append(_relative_error(source.hidden, result.hidden, to_source_basis))
    heads = _Heads(source=source.load_head(), result=result.load_head())
    for window, ids in enumerate(tokens):
        heads.add(source.hidden[window], result.hidden[window], ids.to(source.hidden.device))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return Comparison(
        fp=Perplexity.of_losses(heads.source_losses, predicted),
        quant=Perplexity.of_losses(heads.result_losses, predicted),
        divergence=heads.divergence(),
        layer_errors=tuple(errors),
    )


def _relative_error(
    wanted_WTH: torch.Tensor,  # noqa: N803  shape suffix
    seen_WTH: torch.Tensor,  # noqa: N803  shape suffix
    to_source_basis: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    off = whole = 0.0
    for wanted, seen in zip(wanted_WTH, seen_WTH, strict=True):
        difference = to_source_basis(seen).float() - wanted.float()
        off += float(difference.square().sum(dtype=torch.float64))
        whole += float(wanted.float().square().sum(dtype=torch.float64))
    error = off / whole if whole > 0 else 0.0
    if not math.isfinite(error):
        raise ValueError("the output of a layer is not finite")
    return error


@dataclass(slots=True, kw_only=True)
class _Heads:
    """Both output heads, and what they have said so far."""

    source: nn.Module
    result: nn.Module
    source_losses: list[float] = field(default_factory=list)
    result_losses: list[float] = field(default_factory=list)
    _divergences: list[torch.Tensor] = field(default_factory=list)
    _agreed: int = 0

    def add(self, wanted_TH: torch.Tensor, seen_TH: torch.Tensor, ids_T: torch.Tensor) -> None:  # noqa: N803  shape suffixes
        """Predict one window's tokens with both."""
        for start in range(0, len(ids_T) - 1, HEAD_CHUNK):
            targets_C = ids_T[start + 1 : start + 1 + HEAD_CHUNK]  # noqa: N806  shape suffix
            stop = start + len(targets_C)
            log_p = self.source(wanted_TH[start:stop]).float().log_softmax(-1)
            log_q = self.result(seen_TH[start:stop]).float().log_softmax(-1)
            terms_CV = log_p.exp() * (log_p - log_q)  # noqa: N806  shape suffix
            # rounding of the sum can fall below zero where both agree to the last bit
            self._divergences.append(terms_CV.sum(-1).clamp_min(0).cpu())
            self._agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self.source_losses.append(-float(_gather(log_p, targets_C).sum(dtype=torch.float64)))
            self.result_losses.append(-float(_gather(log_q, targets_C).sum(dtype=torch.float64)))

    def divergence(self) -> Divergence:
        """Sum up all windows.

        Raises:
            ValueError: if a divergence is not finite.
        """
        all_tokens = torch.cat(self._divergences).double()
        mean = float(all_tokens.mean())
        if not math.isfinite(mean):
            raise ValueError("the divergence of a token is not finite")
        ranked = all_tokens.sort().values
        place = math.ceil(PERCENTILE * len(ranked)) - 1
        return Divergence(
            mean=mean,
            p99=float(ranked[place]),
            max=float(ranked[-1]),
            top1_agreement=self._agreed / len(ranked),
        )


def _gather(log_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:  # noqa: N803  shape suffixes
    return log_CV.gather(-1, targets_C[:, None])
