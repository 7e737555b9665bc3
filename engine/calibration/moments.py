"""Second-order rounding of a whole block: linears in the order in which they are met.

Linears that are given the same tensor (query, key, value) share its moments and are rounded
together; those behind them then see what the rounded ones put out.

Shape legend: W windows, T tokens, H hidden size, K inputs of a layer.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from engine.calibration.block import TOKENS_PER_CALL, BlockTask
from engine.calibration.precision import training_precision
from engine.calibration.twins import Student
from engine.calibration.watch import Watch
from engine.methods.second_order import InputMoments, aim_at_full_precision, pass_errors_on
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.swap import swap_modules
from engine.recipe import SecondOrder
from engine.spec import FULL_BITS

__all__ = ["round_by_moments"]

TOKENS, TOKENS_PER_INPUT = 65_536, 16
"""Moments of K inputs are taken over the first windows: this many tokens, or so many an input."""


@torch.no_grad()
def round_by_moments(
    task: BlockTask, student: Student, order: SecondOrder, kv_bits: int, watch: Watch
) -> None:
    """Change the twins' weights so that their nearest codes are those of second-order rounding.

    Grids stay where they are: every twin's range is fixed to what it covers now.

    Args:
        task: the full-precision block and both chains.
        student: the block with the twins in place.
        order: with or without the aim at the full-precision chain.
        kv_bits: of keys and values.
        watch: asked whether to go on.
    """
    block, twins = student.block, student.twins
    student.trains(on=False)
    for names in _shared_inputs(task, block, twins):
        watch.check()
        moments = _collect(task, block, names[0], order, kv_bits)
        for name in names:
            twin = twins[name]
            params = twin.params()
            weight = aim_at_full_precision(twin.weight, moments)
            changed = pass_errors_on(weight, params, twin.grid, moments)
            twin.fix_range(params.covered_range(twin.grid))
            twin.weight = nn.Parameter(changed, requires_grad=False)
        # packed once, instead of rounded anew in every forward that passes through
        swap_modules(
            block, {name: twins[name].to_quant_linear().prepare(dense=True) for name in names}
        )
    swap_modules(block, twins)


def _shared_inputs(
    task: BlockTask, student: nn.Module, twins: Mapping[str, FakeQuantLinear]
) -> list[list[str]]:
    """Group the twins by the tensor that they are given, in the order of the calls."""
    seen: dict[tuple[int, torch.Size], list[str]] = {}
    kept: list[torch.Tensor] = []  # alive, so that no later tensor takes an earlier one's address

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            kept.append(arguments[0])
            # a part of a fused output begins where the whole does
            place = (arguments[0].data_ptr(), arguments[0].shape)
            seen.setdefault(place, []).append(name)

        return hook

    with ExitStack() as hooks:
        for name, twin in twins.items():
            hooks.callback(twin.register_forward_pre_hook(note(name)).remove)
        task.call.run(student, task.inputs[:1].to(task.device))
    groups = list(seen.values())
    called = {name for group in groups for name in group}
    # experts that this window did not reach have inputs of their own
    return groups + [[name] for name in twins if name not in called]


def _collect(
    task: BlockTask, student: nn.Module, name: str, order: SecondOrder, kv_bits: int
) -> InputMoments:
    """Run both chains up to a linear and sum its inputs' products."""
    twin = student.get_submodule(name)
    assert isinstance(twin, FakeQuantLinear)
    features = twin.in_features
    inner, full = _Inputs(features), _Inputs(features)
    own_KK = torch.zeros(features, features, device=task.device)
    shift_KK = torch.zeros_like(own_KK) if order is SecondOrder.GPTAQ else None
    tokens, at_once = 0, max(1, TOKENS_PER_CALL // task.inputs.shape[1])
    with ExitStack() as hooks:
        hooks.callback(student.get_submodule(name).register_forward_pre_hook(inner).remove)
        hooks.callback(task.block.get_submodule(name).register_forward_pre_hook(full).remove)
        for start in range(0, _windows(task, features), at_once):
            windows = slice(start, start + at_once)
            x_MK = twin.transform(inner.of(task, student, task.inputs[windows], kv_bits))
            own_KK.addmm_(x_MK.t(), x_MK)
            tokens += len(x_MK)
            if shift_KK is not None:
                full_MK = full.of(task, task.block, task.full_inputs[windows], FULL_BITS)
                full_MK = twin.as_seen(full_MK)
                all_tokens = task.inputs[windows].shape[:2].numel()
                if not len(full_MK) == len(x_MK) == all_tokens:
                    # an expert that other tokens reach: there is nothing to compare with
                    shift_KK = None
                    continue
                shift_KK.addmm_((full_MK - x_MK).t(), x_MK)
    count = max(1, tokens)
    return InputMoments(own=own_KK / count, shift=None if shift_KK is None else shift_KK / count)


def _windows(task: BlockTask, features: int) -> int:
    enough = max(TOKENS, TOKENS_PER_INPUT * features)
    return min(len(task.inputs), -(-enough // task.inputs.shape[1]))


class _Stop(Exception):
    """The input that was wanted is there."""


class _Inputs:
    """Keeps what a linear is given and ends the forward there."""

    def __init__(self, features: int) -> None:
        self._features = features
        self._seen: torch.Tensor | None = None

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._seen = arguments[0].float().flatten(0, -2)
        raise _Stop

    def of(
        self, task: BlockTask, block: nn.Module, hidden: torch.Tensor, kv_bits: int
    ) -> torch.Tensor:
        """Run a block on ``[B, T, H]``; the linear's inputs are float32 ``[M, K]``."""
        self._seen = None
        with suppress(_Stop), training_precision(task.device):
            task.call.run(block, hidden.to(task.device), kv_bits)
        return self._taken(task.device)

    def _taken(self, device: torch.device) -> torch.Tensor:
        """What was kept; no rows where no token came by."""
        return torch.zeros(0, self._features, device=device) if self._seen is None else self._seen
