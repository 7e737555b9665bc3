"""Steps that are chunks of prompts alone, as CUDA graphs: one for every number of tokens captured.

A batch is filled up to the next of these numbers by tokens that belong to no sequence: they store
no keys and values, attention passes them by, and nothing else in a decoder mixes tokens, so their
rows may hold anything. Sequences are filled up by such of no tokens, rows of logits by the first
token again. What a step sends lies where the graphs read it: the arenas of a runner go to one place
on the device, and a batch of so many tokens always lies alike there.

Drawing, which depends on what the sequences ask for, is launched behind the replay. It reads
logits that lie outside the memory that graphs share.

Shape legend: S sequences of a captured step, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.inference.graph_pool import GraphPool
from engine.inference.mixed_batch import MixedBatch
from engine.inference.mixed_forward import MixedForward, add_parts
from engine.inference.ports import TokenDecoder
from engine.inference.runner_options import RunnerOptions
from engine.inference.step_buffers import HostArena

__all__ = ["MOST_SEQUENCES", "ChunkGraphs", "chunk_sizes"]

MOST_SEQUENCES = 8
"""Of a captured step: each costs a row of logits, wanted or not."""


def chunk_sizes(decoder: TokenDecoder, options: RunnerOptions) -> tuple[int, ...]:
    """Numbers of tokens that chunks of prompts are filled up to, in rising order."""
    return () if decoder.chunks_wait else options.chunk_buckets_on(decoder.device.type)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    places: Mapping[str, slice]


class ChunkGraphs:
    """Captured forward passes of chunks; without captures, the same passes launch by launch."""

    def __init__(self, forward: MixedForward, buckets: Sequence[int] = ()) -> None:
        """Begin without captures.

        Args:
            forward: what to run; the last slot of its state is nobody's.
            buckets: numbers of tokens in rising order that others are filled up to; empty for none.
        """
        self._forward, self._buckets = forward, tuple(buckets)
        self._scratch = len(forward.state.block_table) - 1
        self._sequences = min(MOST_SEQUENCES, self._scratch)
        self._captured: dict[int, _Captured] = {}
        self._logits: torch.Tensor | None = None

    @property
    def captured(self) -> tuple[int, ...]:
        """Numbers of tokens that are replayed."""
        return tuple(sorted(self._captured))

    def fill(self, batch: MixedBatch) -> MixedBatch | None:
        """Fill a batch up to a size that is captured; None where it is no such batch."""
        tokens, others = len(batch.token_ids), batch.drafting or batch.scoring
        if batch.decodes or others or len(batch.slots) > self._sequences:
            return None
        size = next((each for each in self._buckets if each >= tokens), None)
        return None if size is None else batch.filled(size, self._sequences, self._scratch)

    def forward(self, sent: torch.Tensor, places: Mapping[str, slice]) -> torch.Tensor:
        """Compute logits ``[S, V]`` of a batch that was filled, valid until the next call.

        Args:
            sent: an arena on the device.
            places: of the batch therein, the first that was added.
        """
        captured = self._captured.get(_size(places))
        if captured is None:
            return self._forward.compute(sent, places)
        assert captured.places == places, "a batch lies where the graph reads it"
        assert self._logits is not None, "captures leave logits"
        captured.graph.replay()
        return self._logits

    def capture(self, arena: HostArena, pool: GraphPool) -> None:
        """Run every size once, of padding alone, then capture it, the largest first.

        Args:
            arena: one of those that go to one place on the device.
            pool: on a GPU.
        """
        for size in reversed(self._buckets):
            arena.begin()
            padding = MixedBatch.empty().filled(size, self._sequences, self._scratch)
            places = add_parts(padding, arena)
            sent = arena.send()
            # compiles, and makes the workspaces that a capture must not make
            logits = self._forward.compute(sent, places)
            if self._logits is None:
                self._logits = torch.empty_like(logits)
            with pool.recorded() as graph:
                self._logits.copy_(self._forward.compute(sent, places))
            self._captured[size] = _Captured(graph=graph, places=places)


def _size(places: Mapping[str, slice]) -> int:
    place = places["token_ids"]
    size: int = place.stop - place.start
    return size
