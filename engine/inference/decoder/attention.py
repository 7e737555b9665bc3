"""The attention of one layer over paged keys and values.

Shape legend: M tokens, Q query heads, H key-value heads, D dims of a head, R of them rotated.
"""

from dataclasses import dataclass

import torch

from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.device import Device
from engine.inference.decoder.operands import Source
from engine.inference.decoder.projection import Projection
from engine.spec import FULL_BITS
from kernels.activation_rounding import round_activations
from kernels.attention import Scoring
from kernels.kv_append import HeadNorms, HeadStates, Rotary
from kernels.kv_pages import KvPages
from kernels.rotary import RotaryTable

__all__ = ["Attention", "Heads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How rows of queries, keys and values divide."""

    queries: int
    """Q."""
    keys: int
    """H."""
    dims: int
    """D."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Projections of a layer, and how its queries weigh keys."""

    qkv: Projection
    """Queries, keys and values of all heads, in this order."""
    out: Projection
    heads: Heads
    scoring: Scoring
    query_bits: int = FULL_BITS
    """Of rotated queries, for each token and head."""
    norms: HeadNorms | None = None
    rotary: RotaryTable | None = None
    """None where positions are added otherwise."""
    biases: torch.Tensor | None = None
    """float32 ``[Q, positions]``, added to scores."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.qkv.nbytes + self.out.nbytes

    def apply(
        self, device: Device, source: Source, batch: TokenBatch, pages: KvPages
    ) -> torch.Tensor:
        """Append the tokens of a batch and attend: ``[M, hidden]``."""
        states = self._split(self.qkv.apply(source))
        query = device.append(states, pages, batch.kv_slots, self._turn(batch), self.norms)
        if self.query_bits != FULL_BITS:
            query = round_activations(query, self.query_bits).to(query.dtype)
        return self.out.apply(device.attend(query, pages, batch, self.scoring, self.biases))

    def _split(self, joined: torch.Tensor) -> HeadStates:
        heads = self.heads
        states = joined.view(len(joined), heads.queries + 2 * heads.keys, heads.dims)
        query, key, value = torch.split(states, [heads.queries, heads.keys, heads.keys], dim=1)
        return HeadStates(query=query, key=key, value=value)

    def _turn(self, batch: TokenBatch) -> Rotary | None:
        if self.rotary is None:
            return None
        return Rotary(cos=self.rotary.cos, sin=self.rotary.sin, positions=batch.positions)
