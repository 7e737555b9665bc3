"""The bit search: measure every layer, solve for the target, and say why.

What it finds are overrides of the spec, one for each layer; calibration takes them as if they had
been asked for. The spec keeps its target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.calibration.watch import Watch
from engine.checkpoint.search_record import ChosenBits, SearchRecord
from engine.effort import SearchPlan, plan_search, search_units
from engine.errors import SpecError
from engine.events import BitsChosen
from engine.models.blocks import BlockModel
from engine.reach import Reach
from engine.search.choice import Choice, UnitTable, choose_bits, unit_tables
from engine.search.measurements import MeasurementStore
from engine.search.sensitivity import Sensitivity
from engine.spec import LayerOverride, QuantSpec
from engine.target import BitTarget

__all__ = ["BitSearch", "FoundBits", "measured_spec"]

MIB_BITS = 8 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBits:
    """The answer."""

    spec: QuantSpec
    """What was asked for, with an override for every layer."""
    record: SearchRecord | None
    """None where nothing was asked: without a target the spec is as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitSearch:
    """Finds the bits of one model."""

    model: BlockModel
    """What calibration will round, in full precision: rotated where that rotates."""
    spec: QuantSpec
    """Has a target."""
    rest_bytes: int
    """Stored bytes of everything that is not quantized."""
    store: MeasurementStore
    watch: Watch
    device: torch.device

    def run(self, tokens: torch.Tensor) -> FoundBits:
        """Measure what the store lacks, and choose.

        Args:
            tokens: int64 ``[W, T]``, the calibration windows; the first ones are used.

        Raises:
            SpecError: if the target is out of reach, naming the range.
            CalibrationDiverged: naming the layer.
            CalibrationInterrupted: if the watch says to stop.
        """
        target = self.spec.target
        if target is None:
            raise SpecError("target", None, "a bit search needs one")
        reach = Reach.of(self.model.architecture, self.spec, self.rest_bytes)
        reach.check(target)
        units = search_units(self.model.architecture, self.spec)
        plan = plan_search(self.model.architecture, self.spec, units, self.device.type)
        self.watch.say(_cost_text(plan, len(units)))
        sensitivity = Sensitivity(
            model=self.model,
            spec=self.spec,
            units=units,
            plan=plan,
            store=self.store,
            watch=self.watch,
            device=self.device,
        )
        sensitivity.measure(tokens[: plan.windows, : plan.length])
        tables = unit_tables(self.spec, units, self.store.units)
        choice = choose_bits(tables, target, reach)
        record = _record(tables, choice, target, plan, reach)
        self.watch.report(
            BitsChosen(
                average_bits=record.predicted_average_bits,
                predicted_loss=record.predicted_loss,
                bits=record.chosen,
            )
        )
        return FoundBits(spec=_with_overrides(self.spec, record.layers), record=record)


def measured_spec(spec: QuantSpec) -> QuantSpec:
    """Reduce a spec to what the measurements depend on, for their fingerprint."""
    target = spec.target
    if target is None:
        return spec
    # how much is allowed changes the choice, not what was measured
    goal = BitTarget(average_bits=1, w_choices=target.w_choices, a_choices=target.a_choices)
    return replace(spec, target=goal)


def _cost_text(plan: SearchPlan, units: int) -> str:
    followed = f"{plan.anchors} width" + ("" if plan.anchors == 1 else "s")
    return (
        f"searching the bits of {units} layers with {plan.windows} windows of {plan.length} tokens,"
        f" {followed} of each followed to the logits: at most {plan.flops:.1e} operations"
    )


def _record(
    tables: Sequence[UnitTable],
    choice: Choice,
    target: BitTarget,
    plan: SearchPlan,
    reach: Reach,
) -> SearchRecord:
    layers = [
        _chosen(table, w_bits, a_bits)
        for table, w_bits, a_bits in zip(tables, choice.w_bits, choice.a_bits, strict=True)
    ]
    stored = sum(table.stored[bits] for table, bits in zip(tables, choice.w_bits, strict=True))
    paid = [each.price_of_last for each in layers if each.price_of_last is not None]
    return SearchRecord(
        target=target,
        windows=plan.windows,
        length=plan.length,
        anchors=plan.anchors,
        flops=plan.flops,
        predicted_weight_loss=sum(each.w_losses[str(each.w_bits)] for each in layers),
        predicted_activation_loss=sum(each.a_losses[str(each.a_bits)] for each in layers),
        predicted_average_bits=stored / reach.weights,
        predicted_bytes=reach.bytes_at(stored),
        price=min(paid) if paid else None,
        layers=tuple(layers),
    )


def _chosen(table: UnitTable, w_bits: int, a_bits: int) -> ChosenBits:
    by_size = sorted(table.stored, key=lambda bits: (table.stored[bits], -bits))
    place = by_size.index(w_bits)
    cheaper = [bits for bits in by_size[:place] if table.stored[bits] < table.stored[w_bits]]
    dearer = [bits for bits in by_size[place:] if table.stored[bits] > table.stored[w_bits]]
    return ChosenBits(
        name=table.unit.name,
        w_bits=w_bits,
        a_bits=a_bits,
        is_pinned=table.unit.is_pinned,
        w_losses={str(bits): loss for bits, loss in table.w_losses.items()},
        a_losses={str(bits): loss for bits, loss in table.a_losses.items()},
        price_of_last=_price(table, cheaper[-1], w_bits) if cheaper else None,
        price_of_next=_price(table, w_bits, dearer[0]) if dearer else None,
    )


def _price(table: UnitTable, narrow: int, wide: int) -> float:
    """What a step up saves, in nats per MiB."""
    saved = table.w_losses[narrow] - table.w_losses[wide]
    return saved / (table.stored[wide] - table.stored[narrow]) * MIB_BITS


def _with_overrides(spec: QuantSpec, layers: Sequence[ChosenBits]) -> QuantSpec:
    found = [
        LayerOverride(
            pattern=each.name,
            w_bits=each.w_bits,
            a_bits=None if each.a_bits == spec.a_bits else each.a_bits,
        )
        for each in layers
    ]
    return replace(spec, overrides=(*spec.overrides, *found))
