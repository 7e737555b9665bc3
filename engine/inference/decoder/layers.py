"""Decoder layers: the three arrangements of attention, feed-forward and norms.

What a layer gives is not added to the residual stream yet: the norm that reads it next adds it in
the same launch.

Shape legend: M tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.inference.decoder.attention import Attention
from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.device import Device
from engine.inference.decoder.feed_forward import FeedForward
from engine.inference.decoder.operands import VALUES, NormedSource, PlainSource
from kernels.kv_pages import KvPages
from kernels.layer_math import Norm

__all__ = ["Layer", "NormedBehindLayer", "Norms", "ParallelLayer", "SequentialLayer", "Stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The residual stream between two layers: the sum of both."""

    hidden: torch.Tensor
    """``[M, hidden]``."""
    residual: torch.Tensor | None = None
    """``[M, hidden]``; None where `hidden` is the whole stream."""

    @property
    def total(self) -> torch.Tensor:
        """The sum."""
        return self.hidden if self.residual is None else self.hidden + self.residual

    def rows(self, chosen: torch.Tensor | None) -> "Stream":
        """Keep some tokens; None keeps all."""
        if chosen is None:
            return self
        residual = None if self.residual is None else self.residual[chosen]
        return Stream(hidden=self.hidden[chosen], residual=residual)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norms of a layer."""

    attention: Norm
    feed_forward: Norm | None
    """None where both halves read one norm."""
    behind_attention: Norm | None = None
    behind_feed_forward: Norm | None = None


class Layer(Protocol):
    """One decoder layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of its linears."""

    @property
    def chunks_wait(self) -> bool:
        """Whether the host has to see what chunks of prompts computed."""

    def run(self, device: Device, stream: Stream, batch: TokenBatch, pages: KvPages) -> Stream:
        """Pass tokens through, and append their keys and values to the pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Halves:
    """What layers of all arrangements hold."""

    norms: Norms
    attention: Attention
    feed_forward: FeedForward

    @property
    def nbytes(self) -> int:
        """Bytes of its linears."""
        return self.attention.nbytes + self.feed_forward.nbytes

    @property
    def chunks_wait(self) -> bool:
        """Whether the host has to see what chunks of prompts computed."""
        return self.feed_forward.chunks_wait


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialLayer(_Halves):
    """Attention, then feed-forward, each behind its norm."""

    def run(self, device: Device, stream: Stream, batch: TokenBatch, pages: KvPages) -> Stream:
        """Pass tokens through."""
        norms, passes = self.norms, device.passes
        assert norms.feed_forward is not None, "each half has its norm"
        source = NormedSource(passes, stream.hidden, norms.attention, stream.residual)
        hidden = self.attention.apply(device, source, batch, pages)
        hidden = _behind(device, hidden, norms.behind_attention)
        source = NormedSource(passes, hidden, norms.feed_forward, source.total)
        hidden = self.feed_forward.apply(device, source, batch)
        hidden = _behind(device, hidden, norms.behind_feed_forward)
        return Stream(hidden=hidden, residual=source.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayer(_Halves):
    """Both halves read what the layer was given."""

    def run(self, device: Device, stream: Stream, batch: TokenBatch, pages: KvPages) -> Stream:
        """Pass tokens through."""
        norms, passes = self.norms, device.passes
        first = NormedSource(passes, stream.hidden, norms.attention, stream.residual)
        attended = self.attention.apply(device, first, batch, pages)
        second = first
        if norms.feed_forward is not None:
            second = NormedSource(passes, first.total, norms.feed_forward)
        hidden = self.feed_forward.apply(device, second, batch) + attended
        return Stream(hidden=hidden, residual=first.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedBehindLayer(_Halves):
    """Each half reads the stream as it is, and its sum with it is normalized."""

    def run(self, device: Device, stream: Stream, batch: TokenBatch, pages: KvPages) -> Stream:
        """Pass tokens through."""
        norms, passes, hidden = self.norms, device.passes, stream.total
        assert norms.feed_forward is not None, "each half has its norm"
        given = self.attention.apply(device, PlainSource(passes, hidden), batch, pages)
        hidden = _normalize(device, given, norms.attention, hidden)
        given = self.feed_forward.apply(device, PlainSource(passes, hidden), batch)
        return Stream(hidden=_normalize(device, given, norms.feed_forward, hidden))


def _behind(device: Device, hidden: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return hidden if norm is None else _normalize(device, hidden, norm, None)


def _normalize(
    device: Device, hidden: torch.Tensor, norm: Norm, residual: torch.Tensor | None
) -> torch.Tensor:
    normed = device.passes.normed(hidden, norm, VALUES, residual).operand
    assert isinstance(normed, torch.Tensor), "values were asked for"
    return normed
