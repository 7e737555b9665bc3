"""What flows into the linear layers of a block: the warm start of whatever is learned.

Shape legend: W windows, T tokens, H hidden size, K inputs of a layer.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from engine.calibration.capture import BlockCall
from engine.modules.rotated import OnlineHadamard
from engine.modules.swap import named_linears

__all__ = ["input_power"]


@torch.no_grad()
def input_power(
    block: nn.Module,
    call: BlockCall,
    inputs: torch.Tensor,
    hadamards: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Run a full-precision block and take the mean square of every linear's inputs.

    Args:
        block: a decoder layer with plain linears.
        call: how it is called.
        inputs: ``[W, T, H]``.
        hadamards: blocks of online transforms by the linear's name: their outputs are measured.

    Returns:
        float32 ``[K]`` by the linear's name inside the block.
    """
    sums: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, linear in named_linears(block).items():
            sums[name] = torch.zeros(linear.in_features, device=inputs.device)
            size = (hadamards or {}).get(name, 0)
            transform = OnlineHadamard(size).to(inputs.device) if size else nn.Identity()
            handle = linear.register_forward_pre_hook(_adder(sums[name], transform))
            hooks.callback(handle.remove)
        for window in range(len(inputs)):
            call.run(block, inputs[window : window + 1])
    tokens = inputs.shape[0] * inputs.shape[1]
    return {name: total / tokens for name, total in sums.items()}


def _adder(
    total_K: torch.Tensor, transform: nn.Module
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        x: torch.Tensor = transform(arguments[0])
        total_K.add_(x.float().square().flatten(0, -2).sum(0))

    return add
