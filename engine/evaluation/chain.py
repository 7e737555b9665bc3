"""Hidden states of all windows on their way through a model, one decoder block at a time.

Of a model on disk one block is in memory. Every window starts from an empty context.

Shape legend: W windows, T tokens, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from engine.calibration.capture import BlockCall, capture_inputs
from engine.models.blocks import BlockModel
from engine.spec import FULL_BITS

__all__ = ["Chain"]

GPU_TOKENS = 16384
"""Tokens that a GPU gets at once: one window of a small model does not fill it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One model's hidden states; `advance` replaces them in place."""

    model: BlockModel
    hidden: torch.Tensor
    """``[W, T, H]``, the outputs of the blocks that have run."""
    calls: tuple[BlockCall, ...]
    kv_bits: int
    device: torch.device | str
    batch: int
    """Windows that a block gets at once."""

    @classmethod
    def start(
        cls,
        model: BlockModel,
        tokens: torch.Tensor,
        *,
        kv_bits: int = FULL_BITS,
        device: torch.device | str = "cpu",
        batch: int | None = None,
    ) -> Self:
        """Embed the windows.

        Args:
            model: any model in blocks.
            tokens: int64 ``[W, T]``.
            kv_bits: what keys and values are rounded to.
            device: where the blocks run and the hidden states are.
            batch: windows that a block gets at once; None takes one on a CPU, several on a GPU.
        """
        inputs = capture_inputs(model, tokens, device)
        on_gpu = torch.device(device).type == "cuda"
        fitting = max(1, GPU_TOKENS // tokens.shape[1]) if on_gpu else 1
        return cls(
            model=model,
            hidden=inputs.hidden,
            calls=inputs.calls,
            kv_bits=kv_bits,
            device=device,
            batch=batch or fitting,
        )

    @property
    def steps(self) -> int:
        """Windows times blocks."""
        return len(self.calls) * len(self.hidden)

    @torch.no_grad()
    def advance(self, index: int, on_windows: Callable[[int], None]) -> None:
        """Run block `index` over all windows; `on_windows` is told how many and may raise."""
        block = self.model.load_block(index).to(self.device)
        call = self.calls[index]
        for first in range(0, len(self.hidden), self.batch):
            # a view: writing to it writes to the tensor
            windows = self.hidden[first : first + self.batch]
            windows.copy_(call.run(block, windows, self.kv_bits))
            on_windows(len(windows))

    def load_head(self) -> nn.Module:
        """The final norm and the output head, where the hidden states are."""
        return self.model.load_head().to(self.device)
