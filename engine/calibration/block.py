"""One decoder block as calibration sees it: what goes in, what shall come out, what it became.

Shape legend: W windows, T tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from engine.architecture import Architecture
from engine.calibration.capture import BlockCall
from engine.calibration.placement import Placement
from engine.families.base import ChannelPair, NormKind, QueryKeyPair
from engine.modules.linear import QuantLinear

__all__ = [
    "TOKENS_PER_CALL",
    "BlockShape",
    "BlockTask",
    "LearnedBlock",
    "run_windows",
    "stream_windows",
]

TOKENS_PER_CALL = 8192
"""On a GPU; a CPU takes window by window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """What the family's table says about a block."""

    norm: NormKind
    pairs: tuple[ChannelPair, ...]
    query_key: QueryKeyPair | None
    last_linears: tuple[str, ...] = ()
    """Of the feed-forward, one for each expert, by the name inside the block."""
    hadamards: Mapping[str, int] = field(default_factory=dict)
    """Blocks of online transforms, by the linear's name inside the block."""
    can_record: bool = True
    """Whether the forward is the same launches for any input (no experts)."""

    @classmethod
    def of(cls, architecture: Architecture, hadamards: Mapping[str, int]) -> Self:
        """Read the family's table."""
        return cls(
            norm=architecture.family.norm,
            pairs=architecture.pairs,
            query_key=architecture.query_key,
            last_linears=architecture.last_linears,
            hadamards=hadamards,
            can_record=architecture.family.experts is None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTask:
    """One block and what it shall do."""

    index: int
    total: int
    name: str
    """Full name, as `model.layers.3`."""
    block: nn.Module
    """In full precision; ends with what was learned in place."""
    call: BlockCall
    shape: BlockShape
    inputs: torch.Tensor
    """``[W, T, H]`` of the quantized chain."""
    full_inputs: torch.Tensor
    """``[W, T, H]`` of the full-precision chain."""
    wanted: torch.Tensor
    """``[W, T, H]`` outputs of the full-precision chain."""
    token_weight: torch.Tensor
    """float32 ``[W, T, 1]``: what each token's error counts."""
    placement: Placement | None = None
    """Where further chains go; None puts them beside the inputs."""

    @property
    def device(self) -> torch.device:
        """Where the block is; chains may be elsewhere."""
        return next(self.block.parameters()).device

    def make_chain(self) -> torch.Tensor:
        """Make room for ``[W, T, H]``, where the other chains are."""
        if self.placement is None:
            return torch.empty_like(self.inputs)
        return self.placement.empty(self.inputs.shape, self.inputs.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedBlock:
    """A rounded block."""

    layers: dict[str, QuantLinear]
    """By name inside the block."""
    others: dict[str, torch.Tensor]
    """Norms and biases that changed, by name inside the block."""
    loss_before: float
    loss_after: float
    fell_back: bool = False
    """True where learning diverged and plain rounding was kept."""


def run_windows(
    block: nn.Module,
    call: BlockCall,
    inputs: torch.Tensor,
    kv_bits: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a block to ``[W, T, H]`` and keep what it puts out.

    Args:
        block: on its device.
        call: how it is called.
        inputs: on any device, or on disk.
        kv_bits: of keys and values.
        out: takes the outputs; may be `inputs`. None makes a tensor beside the inputs.
    """
    outputs = torch.empty_like(inputs) if out is None else out
    for windows, some in stream_windows(block, call, inputs, kv_bits):
        outputs[windows] = some.to(outputs.device)
    return outputs


@torch.no_grad()
def stream_windows(
    block: nn.Module, call: BlockCall, inputs: torch.Tensor, kv_bits: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Apply a block to some windows at a time.

    Args:
        block: on its device.
        call: how it is called.
        inputs: ``[W, T, H]`` on any device, or on disk.
        kv_bits: of keys and values.

    Yields:
        Which windows, and their outputs ``[B, T, H]`` on the block's device.
    """
    device = next(block.parameters(), next(block.buffers(), inputs)).device
    at_once = 1 if device.type == "cpu" else max(1, TOKENS_PER_CALL // inputs.shape[1])
    for start in range(0, len(inputs), at_once):
        windows = slice(start, start + at_once)
        yield windows, call.run(block, inputs[windows].to(device), kv_bits)
