"""What stands before the first layer and behind the last: embeddings, final norm and head.

Shape legend: M tokens, R tokens whose logits are wanted, V vocabulary, E width of the embedding,
H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import nn

from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.device import Device
from engine.inference.decoder.layers import Stream
from engine.inference.decoder.operands import NormedSource, PlainSource, Source
from engine.inference.decoder.projection import Projection
from engine.models.parts import SoftCap
from engine.modules.rotated import ResidualRotation, UnrotatedNorm
from kernels.layer_math import Norm

__all__ = ["Entry", "Exit", "Learned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """An embedding of positions."""

    weight: torch.Tensor
    """float ``[positions + offset, H]``."""
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """From token ids to the residual stream."""

    weight: torch.Tensor
    """float ``[V, E]``."""
    scale: torch.Tensor | None = None
    """A number of the same dtype that multiplies rows."""
    rotation: ResidualRotation | None = None
    """Of rows, where the weight could not be rotated because the head reads it too."""
    project: Projection | None = None
    """From E to H, where they differ."""
    learned: Learned | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        project = 0 if self.project is None else self.project.nbytes
        learned = 0 if self.learned is None else self.learned.weight.nbytes
        return self.weight.nbytes + project + learned

    def run(self, device: Device, batch: TokenBatch) -> Stream:
        """Look up the tokens of a batch."""
        hidden = nn.functional.embedding(batch.token_ids, self.weight)
        if self.scale is not None:
            hidden = hidden * self.scale
        if self.rotation is not None:
            hidden = self.rotation(hidden)
        if self.project is not None:
            hidden = self.project.apply(PlainSource(device.passes, hidden))
        if self.learned is not None:
            rows = batch.positions + self.learned.offset
            hidden = hidden + nn.functional.embedding(rows, self.learned.weight)
        return Stream(hidden=hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """From the residual stream to logits."""

    norm: Norm | UnrotatedNorm | None
    """One that rotates back where the head reads plain channels; None where there is none."""
    head: Projection
    project: Projection | None = None
    """From H to E, where they differ."""
    cap: SoftCap | None = None
    shares_weight: bool = False
    """Whether the head is the embedding."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are no embedding's."""
        project = 0 if self.project is None else self.project.nbytes
        return project + (0 if self.shares_weight else self.head.nbytes)

    def run(self, device: Device, stream: Stream) -> torch.Tensor:
        """Give logits ``[R, V]``."""
        source = self._source(device, stream)
        if self.project is not None:
            source = PlainSource(device.passes, self.project.apply(source))
        logits = self.head.apply(source)
        return logits if self.cap is None else self.cap(logits)

    def _source(self, device: Device, stream: Stream) -> Source:
        if isinstance(self.norm, Norm):
            return NormedSource(device.passes, stream.hidden, self.norm, stream.residual)
        total = stream.total
        return PlainSource(device.passes, total if self.norm is None else self.norm(total))
