"""The two phases in which a block's student is trained.

Ranges: what rewrites weights before they are rounded (equivalent transformation, compensation) and
the clips of ranges that follow the weights. Rounding: offsets of codes, and factors of ranges that
stay. A phase without parameters takes no steps; where both have some, the first takes a third.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from engine.calibration.attention import AttentionTeacher
from engine.calibration.block import BlockTask, run_windows
from engine.calibration.stepper import Examples, ParameterGroup, Schedule
from engine.calibration.train import train
from engine.calibration.twins import Student
from engine.calibration.watch import Watch
from engine.methods.base import BlockOutputs, Method
from engine.methods.rounding import bound_offsets, start_offsets
from engine.modules.attention import AttentionProbe
from engine.spec import FULL_BITS, QuantSpec

__all__ = ["Phases"]

SEED_STRIDE = 1_000_003
"""Keeps the random order of a block its own: a resumed run needs no earlier block's."""
RANGES_PART = 3
"""The first phase takes one epoch in so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Trains one student."""

    task: BlockTask
    spec: QuantSpec
    method: Method
    student: Student
    watch: Watch

    @property
    def ranges_epochs(self) -> int:
        """Epochs of the first phase."""
        epochs = self.spec.trained_epochs
        if not self.method.trains_rounding:
            return epochs
        return max(1, epochs // RANGES_PART) if self.method.trains_ranges else 0

    def train_ranges(self, transform: list[nn.Parameter]) -> None:
        """Train transformation and clips together.

        Raises:
            TrainingDiverged: if losses are not finite.
            CalibrationInterrupted: if the watch says to stop.
        """
        groups = [
            ParameterGroup(parameters=transform, rate=self.method.transform_rate),
            ParameterGroup(parameters=self._clips(), rate=self.method.clipping_rate),
        ]
        self._train(groups, 0, self.ranges_epochs, _nothing)

    def train_rounding(self) -> None:
        """Train offsets and clips together.

        Raises:
            TrainingDiverged: if losses are not finite.
            CalibrationInterrupted: if the watch says to stop.
        """
        rounding = self.method.rounding
        offsets = start_offsets(list(self.student.twins.values()), rounding)
        groups = [
            ParameterGroup(parameters=offsets, rate=self.method.rounding_rate),
            ParameterGroup(parameters=self._clips(), rate=self.method.clipping_rate),
        ]
        done = self.ranges_epochs if self.method.trains_ranges else 0
        epochs = self.spec.trained_epochs - done
        self._train(groups, done, epochs, lambda: bound_offsets(offsets, rounding))

    def _clips(self) -> list[nn.Parameter]:
        clips = [twin.clip for twin in self.student.twins.values()]
        return [each for clip in clips if isinstance(clip, nn.Module) for each in clip.parameters()]

    def _train(
        self,
        groups: list[ParameterGroup],
        done: int,
        epochs: int,
        after_step: Callable[[], None],
    ) -> None:
        groups = [each for each in groups if each.parameters]
        if not groups or epochs < 1:
            return
        calibration, task = self.spec.calibration, self.task
        batches = -(-calibration.samples // calibration.batch)
        schedule = Schedule(
            epochs=epochs,
            batch=calibration.batch,
            seed=calibration.seed * SEED_STRIDE + task.index + done * task.total,
            done=(task.index * self.spec.trained_epochs + done) * batches,
            total=task.total * self.spec.trained_epochs * batches,
            device=task.device,
            can_record=task.shape.can_record,
        )
        self.student.trains(on=True)
        train(self._loss(), self._examples(), groups, after_step, schedule, self.watch)
        self.student.trains(on=False)

    def _loss(self) -> Callable[[Examples], torch.Tensor]:
        task, method, kv_bits = self.task, self.method, self.spec.kv_bits
        teacher = AttentionTeacher(task)

        def loss_of(batch: Examples) -> torch.Tensor:
            probe = AttentionProbe()
            with probe if method.attention_loss else nullcontext():
                seen = task.call.run(self.student.block, batch.inputs, kv_bits)
            outputs = BlockOutputs(
                seen=seen, wanted=batch.wanted, own=batch.own, token_weight=batch.token_weight
            )
            loss = method.loss(outputs)
            if batch.full_inputs is None:
                return loss
            return loss + method.attention_loss * teacher.divergence(probe, batch.full_inputs)

        return loss_of

    def _examples(self) -> Examples:
        task = self.task
        own = None
        if self.method.loss.needs_own:
            own = run_windows(task.block, task.call, task.inputs, FULL_BITS, task.make_chain())
        return Examples(
            inputs=task.inputs,
            wanted=task.wanted,
            own=own,
            full_inputs=task.full_inputs if self.method.attention_loss else None,
            token_weight=task.token_weight,
        )


def _nothing() -> None:
    """Parameters of ranges may be anywhere."""
