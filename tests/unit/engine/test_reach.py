import pytest

from engine.errors import SpecError
from engine.fit import check_spec, estimate_bytes, promised_bits
from engine.reach import Reach, activation_choices, stored_bits, weight_choices
from engine.spec import LayerOverride, QuantSpec
from engine.target import BitTarget
from tests.unit.engine.test_fit import SMOLLM2

KEPT = LayerOverride(pattern="*.mlp.*", w_bits=16)
PINNED = LayerOverride(pattern="*.down_proj", w_bits=6, a_bits=16)


def spec_with(*overrides, group_size=64, **goal):
    target = BitTarget(**(goal or {"average_bits": 3.5}))
    return QuantSpec(w_bits=4, a_bits=8, group_size=group_size, overrides=overrides, target=target)


def test_the_range_lies_between_the_narrowest_and_the_widest_choice():
    reach = Reach.of(SMOLLM2, spec_with())

    assert reach.weights == sum(each.weights for each in SMOLLM2.linears)
    assert reach.narrowest_bits == (2 + 24 / 64) * reach.weights
    assert reach.widest_bits == (8 + 24 / 64) * reach.weights
    assert reach.rest_bytes == 2 * (SMOLLM2.parameter_count - reach.weights)


def test_balanced_bits_count_the_planes_that_they_need():
    linear = SMOLLM2.linears[0]
    balanced = QuantSpec(w_bits=2, bit_balance=True).weight_grid(linear.name)

    assert stored_bits(linear, balanced) == 3 * linear.weights + 24 * linear.out_features


def test_pinned_layers_have_one_choice_and_kept_ones_are_no_part():
    spec = spec_with(PINNED, KEPT)

    assert weight_choices(spec, "model.layers.0.self_attn.q_proj") == (2, 3, 4, 5, 6, 8)
    assert weight_choices(spec_with(PINNED), "model.layers.0.mlp.down_proj") == (6,)
    assert activation_choices(spec, "model.layers.0.mlp.down_proj") == (16,)
    assert activation_choices(spec, "model.layers.0.self_attn.q_proj") == (8,)
    assert Reach.of(SMOLLM2, spec).weights < Reach.of(SMOLLM2, spec_with()).weights


def test_an_average_out_of_reach_is_refused_with_the_range():
    with pytest.raises(SpecError) as refused:
        check_spec(SMOLLM2, spec_with(average_bits=2.25))

    assert refused.value.field == "target.average_bits"
    assert "2.375 to 8.375" in refused.value.remedy


def test_the_smallest_size_that_a_refusal_offers_is_accepted():
    with pytest.raises(SpecError) as refused:
        check_spec(SMOLLM2, spec_with(max_bytes=1000, group_size=-1))
    smallest = int(refused.value.remedy.split(" to ")[0].split()[-1])

    check_spec(SMOLLM2, spec_with(max_bytes=smallest, group_size=-1))
    with pytest.raises(SpecError, match=r"target\.max_bytes"):
        check_spec(SMOLLM2, spec_with(max_bytes=smallest - 1, group_size=-1))


def test_what_a_target_allows_is_the_promise():
    reach = Reach.of(SMOLLM2, spec_with())
    bounded = spec_with(max_bytes=reach.rest_bytes + reach.weights // 2)

    assert promised_bits(SMOLLM2, spec_with()) == pytest.approx(3.5)
    assert promised_bits(SMOLLM2, bounded) == pytest.approx(4.0)
    assert estimate_bytes(SMOLLM2, bounded).result_bytes == pytest.approx(
        bounded.target.max_bytes, abs=1
    )
    # nobody knows before measuring; no more than this
    assert promised_bits(SMOLLM2, spec_with(perplexity_increase=0.05)) == 8 + 24 / 64


def test_a_target_beyond_the_widest_choice_promises_no_more_than_that():
    assert promised_bits(SMOLLM2, spec_with(average_bits=16)) == 8 + 24 / 64


def test_a_search_is_part_of_the_estimated_arithmetic():
    plain = estimate_bytes(SMOLLM2, QuantSpec(w_bits=4, a_bits=8, group_size=64))
    searched = estimate_bytes(SMOLLM2, spec_with())

    assert searched.calibration_flops > plain.calibration_flops + 1e12
    assert searched.memory_bytes >= plain.memory_bytes
