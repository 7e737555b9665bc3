import pytest

from engine.architecture import LinearShape
from engine.effort import MAX_FLOPS, WAVE_BYTES, anchors_of, plan_search, search_units
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec
from engine.target import BitTarget
from tests.unit.engine.test_fit import SMOLLM2

TARGET = BitTarget(average_bits=3.5)
WIDTHS = (2, 3, 4, 5, 6, 8)


class Experts:
    """An architecture as far as units read it: one layer, three experts."""

    linears = tuple(
        LinearShape(
            name=f"model.layers.0.mlp.experts.{index}.{name}", out_features=4, in_features=8
        )
        for index in range(3)
        for name in ("up_proj", "down_proj")
    )


def test_every_linear_is_a_unit_in_the_order_of_the_forward_pass():
    kept = LayerOverride(pattern="model.layers.0.*", w_bits=16)
    spec = QuantSpec(w_bits=4, a_bits=8, target=TARGET, overrides=(kept,))

    units = search_units(SMOLLM2, spec)

    assert [each.name for each in units] == [each.name for each in SMOLLM2.linears[7:]]
    assert units[0].w_choices == WIDTHS
    assert units[0].a_choices == (8,)


def test_the_experts_of_a_layer_share_their_bits_by_a_pattern():
    units = search_units(Experts(), QuantSpec(w_bits=4, target=TARGET))

    assert [(each.name, len(each.linears)) for each in units] == [
        ("model.layers.0.mlp.experts.*.up_proj", 3),
        ("model.layers.0.mlp.experts.*.down_proj", 3),
    ]
    assert units[0].weights == 3 * 4 * 8


def test_experts_that_an_override_treats_apart_get_bits_of_their_own():
    pinned = LayerOverride(pattern="*.experts.1.up_proj", w_bits=8)

    units = search_units(Experts(), QuantSpec(w_bits=4, target=TARGET, overrides=(pinned,)))

    ups = {each.name: each.w_choices for each in units if "up_proj" in each.name}
    assert ups == {
        "model.layers.0.mlp.experts.0.up_proj": WIDTHS,
        "model.layers.0.mlp.experts.2.up_proj": WIDTHS,
        "model.layers.0.mlp.experts.1.up_proj": (8,),
    }


@pytest.mark.parametrize(
    ("count", "anchors"), [(1, (4,)), (2, (2, 8)), (3, (2, 4, 8)), (9, WIDTHS)]
)
def test_anchors_spread_over_the_widths(count, anchors):
    assert anchors_of(WIDTHS, count) == anchors


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_stays_within_the_arithmetic_of_its_device(device):
    spec = QuantSpec(w_bits=4, a_bits=8, target=TARGET)

    plan = plan_search(SMOLLM2, spec, search_units(SMOLLM2, spec), device)

    assert plan.flops <= MAX_FLOPS[device]
    assert plan.wave_bytes <= WAVE_BYTES
    assert plan.anchors == (1 if device == "cpu" else len(WIDTHS))


def test_a_plan_takes_no_more_text_than_the_calibration_has():
    calibration = CalibrationSpec(samples=2, length=64)
    spec = QuantSpec(w_bits=4, target=TARGET, calibration=calibration)

    plan = plan_search(SMOLLM2, spec, search_units(SMOLLM2, spec), "cuda")

    assert (plan.windows, plan.length) == (2, 64)
