"""The feed-forward half of a layer: up, activation and down, or experts that are such.

Shape legend: M tokens, E experts, C experts of a token.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.device import Device
from engine.inference.decoder.operands import (
    VALUES,
    ActivatedSource,
    Activation,
    PlainSource,
    Source,
)
from engine.inference.decoder.projection import Projection

__all__ = ["Experts", "FeedForward", "Gated"]


class FeedForward(Protocol):
    """What follows attention."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""

    @property
    def chunks_wait(self) -> bool:
        """Whether the host has to see what chunks of prompts computed."""

    def apply(self, device: Device, source: Source, batch: TokenBatch) -> torch.Tensor:
        """Give ``[M, hidden]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """Up, activation or gate, and down."""

    up: Projection
    """Gates before what they multiply, where there is a gate."""
    down: Projection
    activation: Activation

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.up.nbytes + self.down.nbytes

    @property
    def chunks_wait(self) -> bool:
        """No."""
        return False

    def apply(self, device: Device, source: Source, batch: TokenBatch) -> torch.Tensor:
        """Give ``[M, hidden]``."""
        wide = self.up.apply(source)
        return self.down.apply(ActivatedSource(device.passes, wide, self.activation))


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Each token through the experts that a router chose, weighted."""

    router: nn.Module
    """Of transformers: gives logits, weights ``[M, C]`` and experts ``[M, C]``."""
    experts: tuple[Gated, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of router and experts."""
        routing = sum(each.nbytes for each in self.router.parameters())
        return routing + sum(each.nbytes for each in self.experts)

    @property
    def chunks_wait(self) -> bool:
        """For the choice of the router."""
        return True

    def apply(self, device: Device, source: Source, batch: TokenBatch) -> torch.Tensor:
        """Give ``[M, hidden]``."""
        values = source.read(VALUES)
        assert isinstance(values, torch.Tensor), "values were asked for"
        _, weights, chosen = self.router(values)
        if values.is_cuda and _must_not_wait(batch):
            return self._everywhere(device, source, batch, weights, chosen)
        return self._where_chosen(device, values, batch, weights, chosen)

    def _everywhere(
        self,
        device: Device,
        source: Source,
        batch: TokenBatch,
        weights: torch.Tensor,
        chosen: torch.Tensor,
    ) -> torch.Tensor:
        """Run all tokens through all experts: more work, but no shape depends on the choice."""
        out = None
        for number, expert in enumerate(self.experts):
            part = expert.apply(device, source, batch)
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            part = (part * share).to(part.dtype)
            out = part if out is None else out + part
        assert out is not None, "there are experts"
        return out

    def _where_chosen(
        self,
        device: Device,
        values: torch.Tensor,
        batch: TokenBatch,
        weights: torch.Tensor,
        chosen: torch.Tensor,
    ) -> torch.Tensor:
        """Run each token through its experts alone; the host waits for the choice."""
        out = torch.zeros_like(values)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if len(token):
                own = PlainSource(device.passes, values[token])
                part = expert.apply(device, own, batch) * weights[token, place, None]
                out = out.index_add(0, token, part.to(out.dtype))
        return out


def _must_not_wait(batch: TokenBatch) -> bool:
    return batch.cu_seqlens is None or torch.cuda.is_current_stream_capturing()
