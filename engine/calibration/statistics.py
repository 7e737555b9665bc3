"""What flows into the linear layers of a block: the warm start of whatever is learned.

Shape legend: W windows, T tokens, H hidden size, K inputs of a layer.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from engine.calibration.block import stream_windows
from engine.calibration.capture import BlockCall
from engine.calibration.precision import training_precision
from engine.methods.base import ChannelStatistics
from engine.modules.rotated import OnlineHadamard
from engine.modules.swap import named_linears
from engine.spec import FULL_BITS

__all__ = ["channel_statistics"]


@torch.no_grad()
def channel_statistics(
    block: nn.Module,
    call: BlockCall,
    inputs: torch.Tensor,
    hadamards: Mapping[str, int] | None = None,
) -> dict[str, ChannelStatistics]:
    """Run a full-precision block and measure every linear's inputs.

    Args:
        block: a decoder layer with plain linears.
        call: how it is called.
        inputs: ``[W, T, H]``, on any device, or on disk.
        hadamards: blocks of online transforms by the linear's name: their outputs are measured.

    Returns:
        By the linear's name inside the block; zeros for one that no token reached.
    """
    sums = {name: _Sums(each) for name, each in named_linears(block).items()}
    with ExitStack() as hooks:
        for name, linear in named_linears(block).items():
            size = (hadamards or {}).get(name, 0)
            transform = OnlineHadamard(size) if size else nn.Identity()
            hook = _adder(sums[name], transform.to(linear.weight.device))
            hooks.callback(linear.register_forward_pre_hook(hook).remove)
        # sums of squares need no more digits than the training that they start
        with training_precision(next(block.parameters()).device):
            deque(stream_windows(block, call, inputs, FULL_BITS), maxlen=0)
    return {name: each.result() for name, each in sums.items()}


class _Sums:
    """Running sums and extremes of one linear's inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        empty = torch.zeros(linear.in_features, device=linear.weight.device)
        self._squares, self._low, self._high = empty.clone(), empty.clone(), empty.clone()
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Count float ``[..., K]``."""
        x = x.float().flatten(0, -2)
        if not len(x):
            return
        low, high = x.amin(0), x.amax(0)
        if self._tokens:
            low, high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._low, self._high = low, high
        self._squares.add_(x.square().sum(0))
        self._tokens += len(x)

    def result(self) -> ChannelStatistics:
        """What was seen."""
        power = self._squares / max(1, self._tokens)
        return ChannelStatistics(power=power, low=self._low, high=self._high)


def _adder(sums: _Sums, transform: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        sums.add(transform(arguments[0]))

    return add
