"""The steps that train what a block's twins learn; on a GPU one recorded graph replays them all.

Each epoch shows every window once, in batches, in an order that depends on the seed and the block
alone; AdamW, each group of parameters at its own rate, all rates falling in a straight line. The
state after the best epoch is what remains. A loss that is not finite never reaches that state: the
best one is restored and training goes on at a lower rate, a few times; then the caller is told.

Shape legend: W windows, B windows of a batch, T tokens, H hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.calibration.stepper import Examples, ParameterGroup, Schedule, Stepper, restore
from engine.calibration.watch import Watch

__all__ = ["TrainingDiverged", "train"]

FINAL_RATE = 0.05
"""The rates fall to this part of their start."""
LOWER_RATE = 0.3
"""What the rates are multiplied by after a loss that was not finite."""
MAX_RETRIES = 3


class TrainingDiverged(ArithmeticError):
    """Losses were not finite, at lowered rates too."""


def train(
    forward_loss: Callable[[Examples], torch.Tensor],
    examples: Examples,
    groups: Sequence[ParameterGroup],
    after_step: Callable[[], None],
    schedule: Schedule,
    watch: Watch,
) -> None:
    """Train parameters in place; they end in the state of the best epoch.

    Args:
        forward_loss: scalar loss of a batch, differentiable in the parameters.
        examples: all windows.
        groups: what is trained.
        after_step: brings parameters back to where they may be; launches only.
        schedule: how long and in what order.
        watch: told the progress, asked whether to go on.

    Raises:
        TrainingDiverged: if lower rates do not help either.
        CalibrationInterrupted: if the watch says to stop.
    """
    parameters = [each for group in groups for each in group.parameters]
    best = _Best(state=[each.detach().clone() for each in parameters])
    for attempt in range(MAX_RETRIES + 1):
        lowered = LOWER_RATE**attempt
        if attempt:
            watch.say(f"a loss was not finite; going on at {lowered:.2g} of the learning rate")
        stepper = Stepper(forward_loss, groups, after_step, examples, schedule)
        went_well = _run(stepper, schedule, lowered, best, watch)
        restore(parameters, best.state)
        if went_well:
            return
    raise TrainingDiverged


@dataclass(slots=True, kw_only=True)
class _Best:
    """The parameters after the best epoch of all attempts."""

    state: list[torch.Tensor]
    loss: float = math.inf


def _run(stepper: Stepper, schedule: Schedule, lowered: float, best: _Best, watch: Watch) -> bool:
    """Run all epochs, keeping the best state in `best`; false when a loss was not finite."""
    windows = len(stepper.examples.inputs)
    generator = torch.Generator().manual_seed(schedule.seed)
    batches = math.ceil(windows / schedule.batch)
    steps, done = schedule.epochs * batches, 0
    for _ in range(schedule.epochs):
        order = torch.randperm(windows, generator=generator)
        losses = []
        for batch in order.tensor_split(batches):
            watch.check()
            rate = lowered * (1 - (1 - FINAL_RATE) * done / steps)
            losses.append(stepper.step(batch, rate))
            done += 1
            watch.progress(schedule.stage, schedule.done + done, schedule.total, "step")
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean) or not stepper.is_finite():
            return False
        if mean < best.loss:
            best.loss = mean
            for kept, parameter in zip(best.state, stepper.parameters, strict=True):
                kept.copy_(parameter.detach())
    return True
