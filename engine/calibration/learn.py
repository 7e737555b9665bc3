"""Learning one block: its linears see both chains, round, and keep the best of the results.

    wanted = block(x_full)                       the full-precision chain, never quantized
    seen   = quantized block(x_quantized)        inputs come from the quantized blocks before
    minimize the loss of seen against wanted     by what the method's parts learn

In order, each where the method asks for it: clips are placed by search; the equivalent
transformation is trained and folded; columns pass their rounding errors on; offsets and clips are
trained. The error is measured with the kernels that will run the result: of plain rounding, of what
needs no training, and of what was learned; the least one is kept, so the error never grows.

Shape legend: W windows, T tokens, H hidden size.
"""

import math
from dataclasses import dataclass

import torch

from engine.calibration.block import BlockTask, LearnedBlock, stream_windows
from engine.calibration.equivalence import (
    fold_transform,
    install_compensation,
    install_transform,
)
from engine.calibration.moments import round_by_moments
from engine.calibration.phases import Phases
from engine.calibration.statistics import channel_statistics
from engine.calibration.train import TrainingDiverged
from engine.calibration.twins import Student, make_student
from engine.calibration.watch import BlockStep, Watch
from engine.errors import CalibrationDiverged
from engine.methods.base import ChannelStatistics, Method
from engine.modules.attention import round_queries
from engine.modules.linear import QuantLinear
from engine.modules.swap import swap_modules
from engine.recipe import SecondOrder
from engine.spec import QuantSpec

__all__ = ["learn_block"]

MEASURED_WINDOWS = 64
"""Enough to tell two results of one block apart; training sees all windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    layers: dict[str, QuantLinear]
    others: dict[str, torch.Tensor]
    loss: float


def learn_block(task: BlockTask, spec: QuantSpec, method: Method, watch: Watch) -> LearnedBlock:
    """Round the linears of a block; `task.block` ends with the rounded layers in place.

    Raises:
        CalibrationDiverged: naming the layer whose weights, outputs or losses are not finite.
        CalibrationInterrupted: if the watch says to stop.
    """
    watch.on_step(BlockStep.MEASURING)
    _check_finite(task)
    plain = _measure(task, make_student(task, spec), spec)
    if not math.isfinite(plain.loss):
        raise CalibrationDiverged(task.name, f"the loss became {plain.loss}")
    kept, fell_back = plain, False
    if spec.calibration.epochs > 0 and method.changes_anything:
        try:
            kept = _better(kept, _learn(task, spec, method, watch))
        except TrainingDiverged:
            fell_back = True
            watch.say(f"{task.name}: losses were not finite; plain rounding is kept")
    swap_modules(task.block, kept.layers)
    others = {name: each.float() for name, each in kept.others.items()}
    task.block.load_state_dict(others, strict=False, assign=True)
    round_queries(task.block, spec.q_bits)
    return LearnedBlock(
        layers=kept.layers,
        others=kept.others,
        loss_before=plain.loss,
        loss_after=kept.loss,
        fell_back=fell_back,
    )


def _learn(task: BlockTask, spec: QuantSpec, method: Method, watch: Watch) -> _Candidate:
    """Go through every stage that the method asks for."""
    student = make_student(task, spec)
    phases = Phases(task=task, spec=spec, method=method, student=student, watch=watch)
    watch.on_step(BlockStep.STATISTICS)
    statistics = channel_statistics(task.block, task.call, task.inputs, task.shape.hadamards)
    _place_clips(student, method, statistics)
    if method.trains_ranges:
        transform = []
        if method.equivalent_transform:
            raw = channel_statistics(task.block, task.call, task.inputs)
            transform += install_transform(student, task.shape, raw)
        if method.compensation:
            transform += install_compensation(student, task)
        watch.on_step(BlockStep.TRAINING)
        phases.train_ranges(transform)
    _fold(task, student)
    if method.second_order is not SecondOrder.NONE:
        watch.on_step(BlockStep.MOMENTS)
        round_by_moments(task, student, method.second_order, spec.kv_bits, watch)
    watch.on_step(BlockStep.MEASURING)
    start = _measure(task, student, spec)
    if not method.trains_rounding:
        return start
    watch.on_step(BlockStep.TRAINING)
    # what is left to learn of a range is a factor for each end
    for name, twin in student.twins.items():
        twin.clip = method.factors.clip_for(twin.weight, twin.grid, statistics[name].power)
    phases.train_rounding()
    watch.on_step(BlockStep.MEASURING)
    return _better(start, _measure(task, student, spec))


def _place_clips(
    student: Student, method: Method, statistics: dict[str, ChannelStatistics]
) -> None:
    for name, twin in student.twins.items():
        # statistics are of what an online transform puts out, and so is the weight
        weight, _ = twin.changed()
        twin.clip = method.clipping.clip_for(weight, twin.grid, statistics[name].power)


def _fold(task: BlockTask, student: Student) -> None:
    """Write the transformation into the weights; the clips that were learned with it stay."""
    ranges = {name: twin.params().covered_range(twin.grid) for name, twin in student.twins.items()}
    fold_transform(student, task.shape.norm)
    # ranges stay from here on
    for name, twin in student.twins.items():
        twin.fix_range(ranges[name])


def _measure(task: BlockTask, student: Student, spec: QuantSpec) -> _Candidate:
    """Run the rounded block over the first windows with the kernels that will run it."""
    layers = student.pack()
    swap_modules(student.block, layers)
    student.block.eval()
    losses: list[torch.Tensor] = []
    inputs = task.inputs[:MEASURED_WINDOWS]
    for windows, seen in stream_windows(student.block, task.call, inputs, spec.kv_bits):
        wanted, weight = (
            each[windows].to(seen.device) for each in (task.wanted, task.token_weight)
        )
        # a window's mean has the same bits however many come at once
        errors = zip(seen, wanted, weight, strict=True)
        losses += [((one - other).float().square() * each).mean() for one, other, each in errors]
    swap_modules(student.block, student.twins)
    return _Candidate(
        layers=layers,
        others=student.changed_parts(task.block),
        loss=math.fsum(torch.stack(losses).tolist()) / len(losses),
    )


def _better(first: _Candidate, second: _Candidate) -> _Candidate:
    # a loss that is not finite never wins
    return second if second.loss < first.loss else first


def _check_finite(task: BlockTask) -> None:
    for name, parameter in task.block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            layer = f"{task.name}.{name.rsplit('.', 1)[0]}"
            raise CalibrationDiverged(layer, "a weight is not finite in the source model")
    if not all(bool(torch.isfinite(each.to(task.device)).all()) for each in task.wanted):
        raise CalibrationDiverged(task.name, "the full-precision output is not finite")
