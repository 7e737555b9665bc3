"""Learning one block: its linears see both chains, round, and keep the better of two results.

    wanted = block(x_full)                       the full-precision chain, never quantized
    seen   = quantized block(x_quantized)        inputs come from the quantized blocks before
    minimize mean (seen - wanted)^2              by what the clips learn; weights stay

Plain rounding is measured first with the same inputs; where learning does not beat it, plain
rounding is kept, so the error never grows.

Shape legend: W windows, T tokens, H hidden size.
"""

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.calibration.capture import BlockCall
from engine.calibration.statistics import input_power
from engine.calibration.watch import Watch
from engine.errors import CalibrationDiverged
from engine.events import Stage
from engine.methods.base import Method
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.linear import QuantLinear
from engine.modules.swap import named_linears, swap_modules
from engine.spec import QuantSpec

__all__ = ["BlockTask", "LearnedBlock", "learn_block", "run_windows"]

SEED_STRIDE = 1_000_003
"""Keeps the random order of a block its own: a resumed run needs no earlier block's."""

FINAL_RATE = 0.05
"""The learning rate falls to this part of its start, in a straight line over all steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTask:
    """One block and what it shall do."""

    index: int
    total: int
    name: str
    """Full name, as `model.layers.3`."""
    block: nn.Module
    """In full precision; its linears are replaced."""
    call: BlockCall
    inputs: torch.Tensor
    """``[W, T, H]`` of the quantized chain."""
    wanted: torch.Tensor
    """``[W, T, H]`` outputs of the full-precision chain."""
    hadamards: Mapping[str, int] = field(default_factory=dict)
    """Blocks of online transforms, by the linear's name inside the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedBlock:
    """A rounded block."""

    layers: dict[str, QuantLinear]
    """By name inside the block."""
    outputs: torch.Tensor
    """``[W, T, H]`` of the quantized chain."""
    loss_before: float
    loss_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    outputs: torch.Tensor
    loss: float


def learn_block(task: BlockTask, spec: QuantSpec, method: Method, watch: Watch) -> LearnedBlock:
    """Round the linears of a block; `task.block` ends with the rounded layers in place.

    Raises:
        CalibrationDiverged: naming the layer whose weights, outputs or losses are not finite.
        CalibrationInterrupted: if the watch says to stop.
    """
    _check_finite(task)
    for transform in method.transforms:
        transform.apply(task.block)
    trains = spec.calibration.epochs > 0
    power = _input_power(task) if trains else {}
    twins = _make_twins(task, spec)
    plain = _round(twins, method)
    before = _measure(task, plain, spec)
    _check_loss(task, before.loss)
    kept, after = plain, before
    if trains and _install_clips(twins, method, power):
        swap_modules(task.block, twins)
        _train(task, twins, spec, method, watch)
        learned = _round(twins, method)
        reached = _measure(task, learned, spec)
        _check_loss(task, reached.loss)
        if reached.loss < before.loss:
            kept, after = learned, reached
    swap_modules(task.block, kept)
    return LearnedBlock(
        layers=kept, outputs=after.outputs, loss_before=before.loss, loss_after=after.loss
    )


@torch.no_grad()
def run_windows(
    block: nn.Module, call: BlockCall, inputs: torch.Tensor, kv_bits: int
) -> torch.Tensor:
    """Apply a block to ``[W, T, H]``, window by window."""
    outputs = torch.empty_like(inputs)
    for window in range(len(inputs)):
        outputs[window] = call.run(block, inputs[window : window + 1], kv_bits)[0]
    return outputs


def _check_finite(task: BlockTask) -> None:
    for name, parameter in task.block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            layer = f"{task.name}.{name.rsplit('.', 1)[0]}"
            raise CalibrationDiverged(layer, "a weight is not finite in the source model")
    if not bool(torch.isfinite(task.wanted).all()):
        raise CalibrationDiverged(task.name, "the full-precision output is not finite")


def _check_loss(task: BlockTask, loss: float) -> None:
    if not math.isfinite(loss):
        raise CalibrationDiverged(task.name, f"the loss became {loss}")


def _input_power(task: BlockTask) -> dict[str, torch.Tensor]:
    return input_power(task.block, task.call, task.inputs, task.hadamards)


def _make_twins(task: BlockTask, spec: QuantSpec) -> dict[str, FakeQuantLinear]:
    twins = {}
    for name, linear in named_linears(task.block).items():
        grid = spec.weight_grid(f"{task.name}.{name}")
        if grid is not None:
            a_bits = spec.activation_bits(f"{task.name}.{name}")
            block = task.hadamards.get(name, 0)
            twins[name] = FakeQuantLinear(linear, grid, a_bits, block)
    return twins


def _install_clips(
    twins: dict[str, FakeQuantLinear], method: Method, power: dict[str, torch.Tensor]
) -> bool:
    """Give every twin its clip; tell whether there is anything to train."""
    for name, twin in twins.items():
        twin.clip = method.clipping.clip_for(twin.weight, twin.grid, power[name])
    return bool(_trainable(twins))


def _trainable(twins: dict[str, FakeQuantLinear]) -> list[nn.Parameter]:
    clips = [twin.clip for twin in twins.values()]
    return [each for clip in clips if isinstance(clip, nn.Module) for each in clip.parameters()]


def _round(twins: dict[str, FakeQuantLinear], method: Method) -> dict[str, QuantLinear]:
    rounded = {}
    for name, twin in twins.items():
        params = twin.params()
        codes = method.rounding.codes(twin.weight, params, twin.grid)
        rounded[name] = QuantLinear.from_codes(
            codes, params, twin.grid, twin.a_bits, twin.bias, twin.input_hadamard
        )
        rounded[name].prepare()
    return rounded


def _measure(task: BlockTask, layers: dict[str, QuantLinear], spec: QuantSpec) -> _Measured:
    swap_modules(task.block, layers)
    task.block.eval()
    outputs = run_windows(task.block, task.call, task.inputs, spec.kv_bits)
    losses = [
        float((seen - wanted).square().mean())
        for seen, wanted in zip(outputs, task.wanted, strict=True)
    ]
    return _Measured(outputs=outputs, loss=math.fsum(losses) / len(losses))


def _train(
    task: BlockTask,
    twins: dict[str, FakeQuantLinear],
    spec: QuantSpec,
    method: Method,
    watch: Watch,
) -> None:
    """Train the clips; they end in the state of the best epoch."""
    calibration = spec.calibration
    generator = torch.Generator().manual_seed(calibration.seed * SEED_STRIDE + task.index)
    trained = _trainable(twins)
    optimizer = torch.optim.AdamW(trained, lr=method.learning_rate, weight_decay=0.0)
    steps = calibration.epochs * len(task.inputs)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_RATE, total_iters=steps)
    task.block.train()
    best_loss, best = math.inf, [each.detach().clone() for each in trained]
    done = task.index * steps
    for _ in range(calibration.epochs):
        losses = []
        for window in torch.randperm(len(task.inputs), generator=generator).tolist():
            watch.check()
            inputs, wanted = task.inputs[window : window + 1], task.wanted[window : window + 1]
            with _repeatable_attention(inputs.device):
                loss = method.loss(task.call.run(task.block, inputs, spec.kv_bits), wanted)
                losses.append(float(loss.detach()))
                _check_loss(task, losses[-1])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            optimizer.step()
            rates.step()
            done += 1
            watch.progress(Stage.CALIBRATING, done, task.total * steps, "step")
        if math.fsum(losses) < best_loss:
            best_loss = math.fsum(losses)
            best = [copy.deepcopy(each.detach()) for each in trained]
    task.block.eval()
    for parameter, value in zip(trained, best, strict=True):
        parameter.data.copy_(value)


def _repeatable_attention(device: torch.device) -> AbstractContextManager[None]:
    """Choose an attention whose gradients are the same bits every time."""
    if device.type == "cpu":
        return nullcontext()
    # the fused kernels of a GPU add up their gradients in no fixed order
    return sdpa_kernel(SDPBackend.MATH)
