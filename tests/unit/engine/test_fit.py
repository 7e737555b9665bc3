import pytest

from engine.architecture import check_config
from engine.errors import SpecError
from engine.fit import check_spec, estimate_bytes, promised_bits
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec

SMOLLM2 = check_config(
    {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
)


def test_a_group_that_does_not_divide_is_refused_with_the_sizes_that_do():
    with pytest.raises(SpecError) as refused:
        check_spec(SMOLLM2, QuantSpec.from_notation("w4a8g128"))

    assert (refused.value.field, refused.value.value) == ("group_size", 128)
    assert "K = 576 inputs of model.layers.0.self_attn.q_proj" in refused.value.message
    assert "-1, 32, 64, 96, 192" in refused.value.remedy


def test_every_size_that_the_refusal_offers_is_accepted():
    for size in (32, 64, 96, 192):
        check_spec(SMOLLM2, QuantSpec(w_bits=4, group_size=size))


def test_a_group_that_an_override_asks_for_is_checked_as_well():
    wrong = LayerOverride(pattern="*.3.mlp.down_proj", group_size=160)

    with pytest.raises(SpecError, match=r"model\.layers\.3\.mlp\.down_proj"):
        check_spec(SMOLLM2, QuantSpec(w_bits=4, overrides=(wrong,)))


def test_a_pattern_that_matches_no_layer_is_refused():
    misspelt = LayerOverride(pattern="*.down_project", w_bits=8)

    with pytest.raises(SpecError) as refused:
        check_spec(SMOLLM2, QuantSpec(w_bits=4, overrides=(misspelt,)))

    assert refused.value.field == "overrides[0].pattern"


def test_a_spec_that_quantizes_nothing_is_refused():
    with pytest.raises(SpecError, match="at least one layer"):
        check_spec(SMOLLM2, QuantSpec(w_bits=4, overrides=(LayerOverride(pattern="*", w_bits=16),)))


def test_windows_longer_than_the_model_can_see_are_refused():
    spec = QuantSpec(w_bits=4, calibration=CalibrationSpec(length=16384))

    with pytest.raises(SpecError, match="8192 positions") as refused:
        check_spec(SMOLLM2, spec)

    assert refused.value.field == "calibration.length"


@pytest.mark.parametrize(
    ("notation", "planes"), [("w4a8", 4), ("w3a16", 3), ("w5a6", 5), ("w2*a8", 3), ("w1a8", 1)]
)
def test_per_channel_bits_are_the_planes_and_one_scale_a_row(notation, planes):
    rows = sum(each.out_features for each in SMOLLM2.linears)
    weights = sum(each.weights for each in SMOLLM2.linears)

    promised = promised_bits(SMOLLM2, QuantSpec.from_notation(notation))

    assert promised == pytest.approx(planes + 24 * rows / weights)


def test_groups_cost_a_scale_and_a_zero_point_each():
    assert promised_bits(SMOLLM2, QuantSpec.from_notation("w4a16g64")) == 4 + 24 / 64


def test_layers_in_full_precision_are_no_part_of_the_promise():
    kept = LayerOverride(pattern="*.mlp.*", w_bits=16)
    spec = QuantSpec(w_bits=4, group_size=64, overrides=(kept,))

    assert promised_bits(SMOLLM2, spec) == 4 + 24 / 64
    assert (
        estimate_bytes(SMOLLM2, spec).result_bytes
        > estimate_bytes(SMOLLM2, QuantSpec(w_bits=4, group_size=64)).result_bytes
    )


def test_the_estimate_of_a_known_model_is_what_was_measured():
    estimate = estimate_bytes(SMOLLM2, QuantSpec.from_notation("w4a8"))

    assert estimate.parameters == 134_515_008
    assert estimate.source_bytes == 269_030_016
    # counted in the checkpoint that the engine wrote
    assert estimate.result_bytes == 110_244_096
    assert estimate.disk_bytes > estimate.source_bytes + estimate.result_bytes
