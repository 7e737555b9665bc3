"""The last stage: scales and norms of the whole quantized model, tuned against the full logits.

All blocks are in memory as codes and scales; the teacher is the full-precision chain's last hidden
states, which the loop over blocks has left behind, so no full-precision model is. Codes stay
(EfficientQAT's second phase, Chen et al. 2025), or are chosen anew where weights are trained too.

Shape legend: W windows, B windows of a batch, T tokens, H hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.calibration.capture import BlockCall
from engine.calibration.precision import training_precision
from engine.calibration.resume import Tuning
from engine.calibration.stepper import Examples, ParameterGroup, Schedule, pick
from engine.calibration.train import TrainingDiverged, train
from engine.calibration.watch import Watch
from engine.errors import CalibrationDiverged
from engine.events import Stage
from engine.methods.base import Method
from engine.methods.distillation import logit_divergence
from engine.modules.swap import quant_linears, swap_modules
from engine.modules.tuned import TunedLinear
from engine.recipe import EndToEnd
from engine.spec import CalibrationSpec

__all__ = ["QuantizedStack", "tune_end_to_end"]

NORM_PART = 0.5
"""Norms learn at this part of the scales' rate, relative to their own size."""
MEASURED_WINDOWS = 64
"""Tell whether tuning gained anything."""
OFFSET_RATE = 5e-3
"""Of codes, in steps of the grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedStack:
    """Every block of the quantized model, and what follows the last."""

    blocks: tuple[nn.Module, ...]
    """With `QuantLinear`s; changed in place."""
    names: tuple[str, ...]
    """Full names of the blocks."""
    calls: tuple[BlockCall, ...]
    head: nn.Module
    """Final norm and output head, in full precision; they stay."""
    kv_bits: int
    can_record: bool


def tune_end_to_end(
    stack: QuantizedStack,
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    method: Method,
    calibration: CalibrationSpec,
    watch: Watch,
) -> Tuning:
    """Tune; a result that is no better than the start is dropped.

    Args:
        stack: the quantized model.
        inputs: ``[W, T, H]`` embedded windows.
        wanted: ``[W, T, H]`` last hidden states of the full-precision chain.
        method: says what is tuned, how long and how fast.
        calibration: order and batches.
        watch: told the progress, asked whether to go on.

    Raises:
        CalibrationDiverged: if the quantized model's logits, or the full-precision ones, are not
            finite before anything is tuned.
        CalibrationInterrupted: if the watch says to stop.
    """
    device = next(stack.head.parameters()).device
    ones = torch.ones(*inputs.shape[:2], 1, device=device)
    examples = Examples(inputs=inputs, wanted=wanted, own=None, full_inputs=None, token_weight=ones)
    learned = _Learned(stack, method, calibration.batch)
    before = learned.measure(examples, device)
    if not math.isfinite(before):
        raise CalibrationDiverged("end to end", f"the divergence of the logits became {before}")
    schedule = Schedule(
        epochs=method.end_to_end_epochs,
        batch=calibration.batch,
        seed=calibration.seed,
        done=0,
        total=method.end_to_end_epochs * -(-len(inputs) // calibration.batch),
        device=device,
        can_record=stack.can_record,
        stage=Stage.TUNING,
    )
    try:
        train(learned.loss, examples, learned.groups, learned.bound, schedule, watch)
    except TrainingDiverged:
        watch.say("tuning end to end: losses were not finite; nothing is changed")
        return Tuning(tensors={}, before=before, after=before)
    after = learned.measure(examples, device)
    tensors = learned.tensors() if after < before else {}
    return Tuning(tensors=tensors, before=before, after=min(before, after))


class _Learned:
    """The stack with parameters in place of what is tuned."""

    def __init__(self, stack: QuantizedStack, method: Method, batch: int) -> None:
        self._stack = stack
        self._batch = batch
        trains_codes = method.end_to_end is EndToEnd.WEIGHTS
        self._layers: list[dict[str, TunedLinear]] = []
        for block in stack.blocks:
            layers = {
                name: TunedLinear(each, trains_codes=trains_codes)
                for name, each in quant_linears(block).items()
            }
            swap_modules(block, layers)
            block.eval()
            self._layers.append(layers)
        self._norms = [_norm_parameters(each) for each in stack.blocks]
        self.groups = self._grouped(method.tuning_rate)

    def loss(self, batch: Examples) -> torch.Tensor:
        """Mean divergence of a batch."""
        hidden = batch.inputs
        for block, call in zip(self._stack.blocks, self._stack.calls, strict=True):
            hidden = checkpoint(
                call.run,
                block,
                hidden,
                self._stack.kv_bits,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return logit_divergence(hidden, batch.wanted, self._stack.head)

    @torch.no_grad()
    def measure(self, examples: Examples, device: torch.device) -> float:
        """Mean divergence of the first windows."""
        windows = min(len(examples.inputs), MEASURED_WINDOWS)
        total = 0.0
        for first in range(0, windows, self._batch):
            some = torch.arange(first, min(first + self._batch, windows))
            with training_precision(device):
                total += float(self.loss(pick(examples, some, device))) * len(some)
        return total / windows

    def bound(self) -> None:
        """Gains and norms may be anywhere."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was learned, by full name."""
        found = {}
        for name, layers, norms in zip(self._stack.names, self._layers, self._norms, strict=True):
            for short, layer in layers.items():
                for part, tensor in layer.learned_parts().items():
                    found[f"{name}.{short}.{part}"] = tensor
            for short, parameter in norms.items():
                found[f"{name}.{short}"] = parameter.detach().to(torch.float16)
        return found

    def _grouped(self, rate: float) -> list[ParameterGroup]:
        layers = [each for block in self._layers for each in block.values()]
        gains = [each.gain for each in layers]
        offsets = [each.offset for each in layers if each.offset is not None]
        groups = [
            ParameterGroup(parameters=gains, rate=rate),
            ParameterGroup(parameters=offsets, rate=OFFSET_RATE),
        ]
        for norms in self._norms:
            for parameter in norms.values():
                size = float(parameter.detach().square().mean().sqrt())
                relative = NORM_PART * rate * max(size, 1e-6)
                groups.append(ParameterGroup(parameters=[parameter], rate=relative))
        return [each for each in groups if each.parameters]


def _norm_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """Make the vectors outside linears learn: norms and their biases, by name inside the block."""
    found = {}
    for name, parameter in list(block.named_parameters()):
        owner, _, short = name.rpartition(".")
        if parameter.dim() == 1 and not isinstance(block.get_submodule(owner), TunedLinear):
            found[name] = nn.Parameter(parameter.detach().float().clone())
            setattr(block.get_submodule(owner), short, found[name])
    return found
