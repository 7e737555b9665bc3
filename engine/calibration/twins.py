"""The student of a block: the same block with a training twin in place of every linear.

Weights are shared with the full-precision block, so a block is in memory once.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from engine.calibration.block import BlockTask
from engine.modules.attention import round_queries
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.linear import QuantLinear
from engine.modules.swap import named_linears, swap_modules
from engine.recipe import EndToEnd
from engine.spec import QuantSpec

__all__ = ["Student", "make_student"]


class Student:
    """A block that learns, beside the full-precision one."""

    def __init__(
        self, block: nn.Module, twins: dict[str, FakeQuantLinear], *, keeps_remainders: bool = False
    ) -> None:
        self.block = block
        self._keeps_remainders = keeps_remainders
        self.twins = twins
        """By name inside the block."""

    def trains(self, *, on: bool) -> None:
        """Let the twins be differentiable, or exact; everything else never drops anything."""
        self.block.eval()
        for twin in self.twins.values():
            twin.train(on)

    def pack(self) -> dict[str, QuantLinear]:
        """Round every twin as it is now."""
        keeps = self._keeps_remainders
        layers = {
            name: twin.to_quant_linear(keeps_remainder=keeps) for name, twin in self.twins.items()
        }
        return {name: layer.prepare(dense=True) for name, layer in layers.items()}

    def changed_parts(self, source: nn.Module) -> dict[str, torch.Tensor]:
        """What else differs from the source by now: norms, and biases of the linears."""
        before = source.state_dict()
        skipped = {f"{name}.weight" for name in self.twins}
        changed = {}
        for name, value in _plain_parts(self.block, self.twins).items():
            if name not in skipped and not _is_same(before.get(name), value):
                # two bytes, as in the source, and finer than bfloat16
                changed[name] = value.detach().to(torch.float16)
        return changed


def make_student(task: BlockTask, spec: QuantSpec) -> Student:
    """Copy the structure of a block and put twins in place; weights are shared.

    The copy rounds its queries where the spec says so; the block itself never does.
    """
    shared = {id(each): each for each in (*task.block.parameters(), *task.block.buffers())}
    block = copy.deepcopy(task.block, memo=shared)
    twins = {}
    for name, linear in named_linears(block).items():
        grid = spec.weight_grid(f"{task.name}.{name}")
        if grid is not None:
            a_bits = spec.activation_bits(f"{task.name}.{name}")
            turned = task.shape.hadamards.get(name, 0)
            twins[name] = FakeQuantLinear(linear, grid, a_bits, turned)
    swap_modules(block, twins)
    round_queries(block, spec.q_bits)
    # the last stage goes on from the weights themselves
    keeps = spec.resolved.end_to_end is EndToEnd.WEIGHTS
    return Student(block, twins, keeps_remainders=keeps)


def _plain_parts(block: nn.Module, twins: Iterable[str]) -> Mapping[str, torch.Tensor]:
    """The block's own tensors without what twins learn with."""
    parts = {}
    for name, value in block.state_dict().items():
        owner = next((twin for twin in twins if name.startswith(f"{twin}.")), None)
        if owner is None or name == f"{owner}.bias":
            parts[name] = value
    return parts


def _is_same(before: torch.Tensor | None, after: torch.Tensor) -> bool:
    if before is None or before.shape != after.shape:
        return False
    return before.data_ptr() == after.data_ptr() or torch.equal(before.float(), after.float())
