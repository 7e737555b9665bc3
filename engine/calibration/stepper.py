"""One optimizer step on a batch of windows: launch by launch, or one recorded graph replayed.

Shape legend: W windows, B windows of a batch, T tokens, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.calibration.precision import repeatable_attention, training_precision
from engine.events import Stage

__all__ = ["Examples", "ParameterGroup", "Schedule", "Stepper", "pick", "restore"]

WARM_UP_STEPS = 2
"""Steps before a graph is recorded; their effect is taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What a block is trained on; tensors may be on any device, or on disk."""

    inputs: torch.Tensor
    """``[W, T, H]`` of the quantized chain."""
    wanted: torch.Tensor
    """``[W, T, H]`` outputs of the full-precision chain."""
    own: torch.Tensor | None
    """``[W, T, H]`` outputs of the full-precision block on `inputs`."""
    full_inputs: torch.Tensor | None
    """``[W, T, H]`` inputs of the full-precision chain, where maps are compared."""
    token_weight: torch.Tensor
    """float32 ``[W, T, 1]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that learn at one rate."""

    parameters: list[nn.Parameter]
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, in what order, and where it is reported."""

    epochs: int
    batch: int
    seed: int
    done: int
    """Steps of this calibration before these."""
    total: int
    """All steps of the calibration."""
    device: torch.device
    can_record: bool
    """Whether the block's forward is the same launches for any input."""
    stage: Stage = Stage.CALIBRATING


class Stepper:
    """One optimizer step: launch by launch, or replayed from a recorded graph."""

    def __init__(
        self,
        forward_loss: Callable[[Examples], torch.Tensor],
        groups: Sequence[ParameterGroup],
        after_step: Callable[[], None],
        examples: Examples,
        schedule: Schedule,
    ) -> None:
        self.examples = examples
        self.parameters = [each for group in groups for each in group.parameters]
        self._forward_loss, self._after_step = forward_loss, after_step
        self._device = schedule.device
        self._rates = [group.rate for group in groups]
        on_gpu = schedule.device.type == "cuda"
        settings = [
            # a rate on the GPU can change under a recorded graph
            {"params": each.parameters, "lr": torch.tensor(each.rate, device=schedule.device)}
            for each in groups
        ]
        self._optimizer = torch.optim.AdamW(
            settings, weight_decay=0.0, fused=on_gpu, capturable=on_gpu
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Examples, torch.Tensor]] = {}
        self._records = on_gpu and schedule.can_record

    def step(self, batch: torch.Tensor, rate: float) -> torch.Tensor:
        """Learn from the windows of a batch (int64 ``[B]``); the loss stays on the device."""
        for group, start in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"].fill_(start * rate)
        if not self._records:
            return self._launch(pick(self.examples, batch, self._device))
        if len(batch) not in self._graphs:
            self._graphs[len(batch)] = self._record(batch)
        graph, static, loss = self._graphs[len(batch)]
        _copy(static, pick(self.examples, batch, self._device))
        graph.replay()
        return loss.clone()

    def is_finite(self) -> bool:
        """Whether every parameter is finite."""
        return all(bool(torch.isfinite(each).all()) for each in self.parameters)

    def _launch(self, batch: Examples) -> torch.Tensor:
        with repeatable_attention(self._device), training_precision(self._device):
            loss = self._forward_loss(batch)
        # a recorded backward writes gradients of its own; it must not add to earlier ones
        self._optimizer.zero_grad(set_to_none=True)
        with repeatable_attention(self._device):
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        self._optimizer.step()
        self._after_step()
        return loss.detach()

    def _record(self, batch: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, Examples, torch.Tensor]:
        static = pick(self.examples, batch, self._device)
        before = [each.detach().clone() for each in self.parameters]
        states = self._optimizer_states()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has no types
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._launch(static)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._launch(static)
        restore(self.parameters, before)
        for parameter, name, tensor in self._named_states():
            tensor.copy_(states[parameter, name]) if (parameter, name) in states else tensor.zero_()
        return graph, static, loss

    def _named_states(self) -> list[tuple[torch.Tensor, str, torch.Tensor]]:
        return [
            (parameter, name, value)
            for parameter, state in self._optimizer.state.items()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        ]

    def _optimizer_states(self) -> dict[tuple[torch.Tensor, str], torch.Tensor]:
        return {(parameter, name): value.clone() for parameter, name, value in self._named_states()}


def pick(examples: Examples, batch: torch.Tensor, device: torch.device) -> Examples:
    """Bring the windows of a batch (int64 ``[B]`` on the CPU) to the device."""
    places: dict[torch.device, torch.Tensor] = {}

    def take(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if tensor.device not in places:
            places[tensor.device] = batch.to(tensor.device)
        return tensor[places[tensor.device]].to(device)

    inputs, wanted, weight = (
        take(each) for each in (examples.inputs, examples.wanted, examples.token_weight)
    )
    assert inputs is not None and wanted is not None and weight is not None  # noqa: PT018
    return Examples(
        inputs=inputs,
        wanted=wanted,
        own=take(examples.own),
        full_inputs=take(examples.full_inputs),
        token_weight=weight,
    )


def _copy(target: Examples, source: Examples) -> None:
    for name in ("inputs", "wanted", "own", "full_inputs", "token_weight"):
        found, given = getattr(target, name), getattr(source, name)
        if found is not None:
            found.copy_(given)


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Give parameters earlier values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
