"""Decode steps as CUDA graphs: one for every batch size that is captured, the largest first.

A graph has its batch size for good, so a batch is filled up to the next one with rows of the
scratch slot, whose keys and values go to the scratch page. Drawing is a graph of its own on the
logits of the first, so that a batch pays only for what its sequences ask for.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.inference.decode_step import DecodeStep
from engine.inference.draw_kind import DrawKind
from engine.inference.graph_pool import GraphPool

__all__ = ["DecodeGraphs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    forward: torch.cuda.CUDAGraph
    draws: dict[DrawKind, torch.cuda.CUDAGraph]


class DecodeGraphs:
    """Captured decode steps by batch size; without captures, the same steps launch by launch."""

    def __init__(self, step: DecodeStep, buckets: Sequence[int] = ()) -> None:
        """Begin without captures.

        Args:
            step: what to run.
            buckets: batch sizes in rising order that others are filled up to; empty for none.
        """
        self._step = step
        self._buckets = tuple(buckets)
        self._captured: dict[int, _Captured] = {}
        self._logits: torch.Tensor | None = None

    @property
    def captured(self) -> tuple[int, ...]:
        """Batch sizes that are replayed."""
        return tuple(sorted(self._captured))

    def rows_for(self, sequences: int) -> int:
        """How many rows a batch of so many sequences takes."""
        at = bisect_left(self._buckets, sequences)
        return self._buckets[at] if at < len(self._buckets) else sequences

    def forward(self, rows: int) -> None:
        """Compute the logits of a batch of `rows`, a size that `rows_for` gave."""
        if rows in self._captured:
            self._captured[rows].forward.replay()
        else:
            self._logits = self._step.forward(rows)

    def draw(self, rows: int, kind: DrawKind) -> None:
        """Draw from the logits that `forward` computed last."""
        if rows in self._captured:
            self._captured[rows].draws[kind].replay()
        else:
            assert self._logits is not None, "a draw needs logits"
            self._step.draw(self._logits, kind)
            self._logits = None

    def capture(self, pool: GraphPool) -> None:
        """Run every batch size once, then capture it; the present batch must be all scratch rows.

        Args:
            pool: on a GPU.
        """
        for rows in reversed(self._buckets):
            for kind in DrawKind:
                # compiles, and makes the workspaces that a capture must not make
                self._step.draw(self._step.forward(rows), kind)
            self._captured[rows] = self._capture(rows, pool)

    def _capture(self, rows: int, pool: GraphPool) -> _Captured:
        with pool.recorded() as forward:
            logits = self._step.forward(rows)
        draws = {}
        for kind in DrawKind:
            with pool.recorded() as draws[kind]:
                self._step.draw(logits, kind)
        # the logits are released here: their memory is read by these graphs alone, in this order
        return _Captured(forward=forward, draws=draws)
