"""Log-likelihood of continuations behind their contexts, in batches of similar length.

    score = sum over t in continuation of log p(token[t] | token[<t])

Sequences are padded on the right: attention is causal and positions count from the left, so what
stands behind a sequence changes nothing in it. Of a context that is too long the end is kept.

Shape legend: B sequences of a batch, T tokens of the longest, P positions whose logits are needed,
V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.inference.kv_cache import make_cache
from engine.spec import FULL_BITS

__all__ = ["Continuation", "Score", "Scorer"]

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
BATCH_LOGITS = 1 << 28
"""Float32 logits of a batch; 1 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Tokens to score and what stands before them."""

    context: tuple[int, ...]
    """At least one token."""
    continuation: tuple[int, ...]
    """At least one token."""

    def inputs(self, limit: int) -> tuple[int, ...]:
        """All tokens but the last, from which every token of the continuation is predicted."""
        return (*self.context, *self.continuation)[-limit - 1 : -1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely a continuation is."""

    log_likelihood: float
    is_greedy: bool
    """Whether every token of it is the most likely one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """One model that is in memory as a whole."""

    model: nn.Module
    """A transformers causal language model in evaluation mode."""
    layers: int
    vocabulary: int
    context_length: int
    kv_bits: int = FULL_BITS
    device: torch.device | str = "cpu"

    @torch.inference_mode()
    def score(self, wanted: Sequence[Continuation], on_batch: Callable[[int], None]) -> list[Score]:
        """Score all, in the order given; `on_batch` is told how many a batch had and may raise.

        Raises:
            ValueError: if a continuation does not fit the model's positions.
        """
        for each in wanted:
            if len(each.continuation) > self.context_length:
                raise ValueError(
                    f"a continuation of {len(each.continuation)} tokens does not fit the model's"
                    f" {self.context_length} positions"
                )
        found: dict[int, Score] = {}
        for batch in self._batches(wanted):
            scores = self._score_batch([wanted[place] for place in batch])
            found.update(zip(batch, scores, strict=True))
            on_batch(len(batch))
        return [found[place] for place in range(len(wanted))]

    def _batches(self, wanted: Sequence[Continuation]) -> Iterator[list[int]]:
        lengths = [len(each.inputs(self.context_length)) for each in wanted]
        # the longest come first, so that a lack of memory shows at once
        order = sorted(range(len(wanted)), key=lambda place: (-lengths[place], place))
        batch: list[int] = []
        for place in order:
            rows = len(batch) + 1
            longest = lengths[batch[0]] if batch else lengths[place]
            kept = max(len(wanted[each].continuation) for each in (*batch, place))
            is_full = rows * longest > BATCH_TOKENS
            if batch and (is_full or rows * kept * self.vocabulary > BATCH_LOGITS):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _score_batch(self, batch: Sequence[Continuation]) -> list[Score]:
        rows = [each.inputs(self.context_length) for each in batch]
        longest = max(map(len, rows))
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        ids_BT = torch.tensor(padded, device=self.device)  # noqa: N806  shape suffix
        starts = [len(row) - len(each.continuation) for row, each in zip(rows, batch, strict=True)]
        first = min(starts)
        positions_P = torch.arange(first, longest, device=self.device)  # noqa: N806  shape suffix
        cache = None if self.kv_bits == FULL_BITS else make_cache(self.layers, self.kv_bits)
        output = self.model(
            input_ids=ids_BT,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=positions_P,
        )
        return [
            _score_row(logits_PV[start - first :], each.continuation)
            for logits_PV, start, each in zip(output.logits, starts, batch, strict=True)
        ]


def _score_row(logits_PV: torch.Tensor, continuation: Sequence[int]) -> Score:  # noqa: N803  shape suffix
    targets = torch.tensor(list(continuation), device=logits_PV.device)
    kept = logits_PV[: len(targets)].float()
    chosen = kept.log_softmax(-1).gather(-1, targets[:, None])
    return Score(
        log_likelihood=float(chosen.sum(dtype=torch.float64)),
        is_greedy=bool((kept.argmax(-1) == targets).all()),
    )
