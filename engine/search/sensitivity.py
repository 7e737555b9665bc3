"""How much the predictions suffer when one linear alone is rounded, at every width.

    L(bits of all units)  ~  sum over units of L_u(bits of u)        L_u: all others stay exact

L is the KL divergence of the logits. With D the change of a hidden state, L = D^T F D / 2 up to
third order (F: Fisher information; the gradient of a KL at its minimum is zero). Rounding errors of
different linears are nearly uncorrelated, so the mixed terms average out and L adds up: the model
of HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852), with the divergence measured instead of a Hessian's
trace.

Streaming: blocks come one after the other, and the hidden states of the candidates that are being
followed wait in memory, so the model never has to fit and each block is loaded once for several
units. Of each unit `anchors` widths a are followed to the logits; with r the relative error of the
block's own output, another width is

    L_u(b) = L_u(a) r_u(b) / r_u(a)        a: the nearest width that was followed

because both L_u and r_u are quadratic in the same perturbation. With every width followed nothing
is scaled and L_u is exact. With one anchor a unit, its inputs are scaled from the anchor of its
weights: both enter the block at the same place.

Shape legend: W windows, T tokens, H hidden size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from engine.calibration.capture import BlockCall, capture_inputs
from engine.calibration.statistics import channel_statistics
from engine.calibration.watch import Watch
from engine.effort import SearchPlan, SearchUnit, anchors_of, follows_inputs
from engine.errors import CalibrationDiverged
from engine.events import Stage
from engine.models.blocks import BlockModel
from engine.modules.swap import named_linears
from engine.reach import grid_at
from engine.search.divergence import divergences, relative_error
from engine.search.measurements import Measured, MeasurementStore, UnitMeasurements
from engine.search.perturb import round_weight, rounded_inputs, rounded_weights
from engine.spec import FULL_BITS, QuantSpec

__all__ = ["Sensitivity", "losses_of"]

MIN_ERROR = 1e-30
WEIGHTS, ACTIVATIONS = "weights", "activations"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    unit: str
    part: str
    bits: int


@dataclass(slots=True, kw_only=True)
class _Wave:
    """Candidates of neighbouring blocks."""

    hidden: torch.Tensor
    """``[W, T, H]`` of the full-precision model, in front of the next block."""
    errors: dict[_Key, float] = field(default_factory=dict)
    followed: dict[_Key, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Measures the units of one model into a store."""

    model: BlockModel
    """What will be rounded, in full precision."""
    spec: QuantSpec
    units: list[SearchUnit]
    plan: SearchPlan
    store: MeasurementStore
    watch: Watch
    device: torch.device

    @torch.no_grad()
    def measure(self, tokens: torch.Tensor) -> None:
        """Fill the store with what it lacks.

        Args:
            tokens: int64 ``[W, T]``.

        Raises:
            CalibrationDiverged: naming the unit whose error is not finite.
            CalibrationInterrupted: if the watch says to stop; finished waves stay in the store.
        """
        waves = self._waves()
        missing = [wave for wave in waves if any(self._missing(index) for index in wave)]
        if not missing:
            return
        inputs = capture_inputs(self.model, tokens, self.device)
        hidden = inputs.hidden
        for wave in waves[: waves.index(missing[-1]) + 1]:
            if wave in missing:
                self._measure_wave(wave, inputs.calls, hidden)
            if wave != missing[-1]:
                hidden = self._advance(wave, inputs.calls, hidden)

    def _waves(self) -> list[range]:
        layers, blocks = self.model.architecture.layers, self.plan.wave_blocks
        return [range(first, min(first + blocks, layers)) for first in range(0, layers, blocks)]

    def _units_of(self, index: int) -> list[SearchUnit]:
        prefix = f"{self.model.architecture.layer_name(index)}."
        return [each for each in self.units if each.name.startswith(prefix)]

    def _missing(self, index: int) -> bool:
        return any(each.name not in self.store.units for each in self._units_of(index))

    def _advance(
        self, blocks: range, calls: tuple[BlockCall, ...], hidden: torch.Tensor
    ) -> torch.Tensor:
        for index in blocks:
            self.watch.check()
            hidden = calls[index].run(self.model.load_block(index).to(self.device), hidden)
        return hidden

    def _measure_wave(
        self, blocks: range, calls: tuple[BlockCall, ...], hidden: torch.Tensor
    ) -> None:
        wave = _Wave(hidden=hidden)
        for index in range(blocks.start, self.model.architecture.layers):
            block = self.model.load_block(index).to(self.device)
            wanted = calls[index].run(block, wave.hidden)
            for key, chain in wave.followed.items():
                self.watch.check()
                wave.followed[key] = calls[index].run(block, chain)
            if index in blocks:
                self._try_candidates(index, block, calls[index], wave, wanted)
            wave.hidden = wanted
            self._report(blocks, index)
        head = self.model.load_head().to(self.device)
        measured = divergences(
            head, wave.hidden, list(wave.followed.values()), check=self.watch.check
        )
        found = dict(zip(wave.followed, measured, strict=True))
        units = [unit for index in blocks for unit in self._units_of(index)]
        self.store.add({unit.name: _gather(unit.name, wave.errors, found) for unit in units})

    def _report(self, blocks: range, index: int) -> None:
        """Count blocks over all waves; each one runs from its first block to the model's end."""
        layers = self.model.architecture.layers
        lengths = {each.start: layers - each.start for each in self._waves()}
        before = sum(length for start, length in lengths.items() if start < blocks.start)
        done = before + index - blocks.start + 1
        self.watch.progress(Stage.SEARCHING, done, sum(lengths.values()), "block")

    def _try_candidates(
        self,
        index: int,
        block: nn.Module,
        call: BlockCall,
        wave: _Wave,
        wanted: torch.Tensor,
    ) -> None:
        """Run a block once for each width of each of its units."""
        found = channel_statistics(block, call, wave.hidden)
        power = {name: each.power for name, each in found.items()}
        prefix = f"{self.model.architecture.layer_name(index)}."
        linears = named_linears(block)
        for unit in self._units_of(index):
            names = [each.name.removeprefix(prefix) for each in unit.linears]
            members = {name: linears[name] for name in names}
            for key, changed in self._candidates(unit, members, power):
                self.watch.check()
                with changed:
                    seen = call.run(block, wave.hidden)
                wave.errors[key] = relative_error(seen, wanted)
                if not math.isfinite(wave.errors[key]):
                    raise CalibrationDiverged(
                        unit.name, f"its error at {key.bits} bits is no number"
                    )
                if self._is_followed(unit, key):
                    wave.followed[key] = seen

    def _candidates(
        self,
        unit: SearchUnit,
        members: dict[str, nn.Linear],
        power: dict[str, torch.Tensor],
    ) -> Iterator[tuple[_Key, AbstractContextManager[None]]]:
        linears = list(members.values())
        for bits in unit.w_choices:
            grid = grid_at(self.spec, unit.linears[0].name, bits)
            if grid is not None:
                rounded = [round_weight(each.weight, grid, power[n]) for n, each in members.items()]
                key = _Key(unit=unit.name, part=WEIGHTS, bits=bits)
                yield key, rounded_weights(linears, rounded)
        for bits in unit.a_choices:
            if bits != FULL_BITS:
                key = _Key(unit=unit.name, part=ACTIVATIONS, bits=bits)
                yield key, rounded_inputs(linears, bits)

    def _is_followed(self, unit: SearchUnit, key: _Key) -> bool:
        if key.part == ACTIVATIONS and not follows_inputs(self.plan.anchors):
            return False
        choices = unit.w_choices if key.part == WEIGHTS else unit.a_choices
        measured = tuple(each for each in choices if each != FULL_BITS)
        return key.bits in anchors_of(measured, self.plan.anchors)


def losses_of(
    table: Mapping[int, Measured], widths: Sequence[int], others: Mapping[int, Measured]
) -> dict[int, float]:
    """Read or scale the divergence at every width, in nats per token; 16 bits cost nothing.

    Args:
        table: the measured widths of a unit's weights or inputs.
        widths: those to answer for.
        others: of the same unit, to scale from where no width of the table was followed.
    """
    order = sorted(table)
    anchors = {bits: table[bits] for bits in order if table[bits].divergence is not None}
    losses = {}
    for bits in widths:
        if bits == FULL_BITS:
            losses[bits] = 0.0
        elif anchors:
            nearest = min(anchors, key=lambda each: abs(order.index(each) - order.index(bits)))
            losses[bits] = _scaled(anchors[nearest], table[bits])
        else:
            anchor = next(each for each in others.values() if each.divergence is not None)
            losses[bits] = _scaled(anchor, table[bits])
    return losses


def _scaled(anchor: Measured, measured: Measured) -> float:
    assert anchor.divergence is not None, "an anchor was followed to the logits"
    if measured.divergence is not None:
        return measured.divergence
    return anchor.divergence * measured.error / max(anchor.error, MIN_ERROR)


def _gather(unit: str, errors: dict[_Key, float], found: dict[_Key, float]) -> UnitMeasurements:
    tables: dict[str, dict[int, Measured]] = {WEIGHTS: {}, ACTIVATIONS: {}}
    for key, error in errors.items():
        if key.unit == unit:
            measured = Measured(error=error, divergence=found.get(key))
            tables[key.part][key.bits] = measured
    return UnitMeasurements(weights=tables[WEIGHTS], activations=tables[ACTIVATIONS])
