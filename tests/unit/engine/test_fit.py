import pytest

from engine.architecture import check_config
from engine.errors import SpecError
from engine.fit import check_spec, estimate_bytes, promised_bits
from engine.recipe import EndToEnd, Ingredients, Recipe, SecondOrder
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec

SMOLLM2_CONFIG = {
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
SMOLLM2 = check_config(SMOLLM2_CONFIG)
LLAMA_7B = check_config(
    SMOLLM2_CONFIG
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
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


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_transform_at_run_time_that_would_be_none_is_refused_where_it_is_asked_for(activation):
    opt = check_config(
        SMOLLM2_CONFIG | {"model_type": "opt", "ffn_dim": 1536, "activation_function": activation}
    )
    asked = Ingredients(online_hadamard=True)

    # a recipe's own answer is for families that can
    check_spec(opt, QuantSpec(w_bits=4, a_bits=8))
    if activation == "relu":
        check_spec(opt, QuantSpec(w_bits=4, ingredients=asked))
    else:
        with pytest.raises(SpecError, match=r"online_hadamard = True .* no linear of opt"):
            check_spec(opt, QuantSpec(w_bits=4, ingredients=asked))


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


def estimate_of(recipe, device_type="cuda", **fields):
    calibration = CalibrationSpec(samples=128, length=1024, **fields.pop("calibration", {}))
    spec = QuantSpec(w_bits=4, group_size=64, recipe=recipe, calibration=calibration, **fields)
    return estimate_bytes(LLAMA_7B, spec, device_type)


def test_a_gpu_must_hold_a_block_and_not_the_hidden_states():
    calibration = CalibrationSpec(samples=32, length=512)
    short = QuantSpec(w_bits=4, group_size=64, recipe=Recipe.FAST, calibration=calibration)
    small, large = estimate_bytes(LLAMA_7B, short, "cuda"), estimate_of(Recipe.FAST)

    assert small.memory_bytes == large.memory_bytes
    # inputs and outputs of one chain, and the other one
    assert large.chain_bytes == 3 * 128 * 1024 * 4096 * 4 == 8 * small.chain_bytes


def test_a_cpu_holds_both_and_the_embedding_in_one_memory():
    cpu = estimate_of(Recipe.RTN, "cpu")

    weights = 4 * sum(each.weights for each in LLAMA_7B.linears_per_layer)
    embedding = 4 * LLAMA_7B.vocab * LLAMA_7B.hidden
    assert cpu.host_bytes == cpu.memory_bytes > weights + embedding + cpu.chain_bytes
    assert estimate_of(Recipe.RTN).host_bytes == weights + embedding


def test_what_is_learned_of_every_weight_takes_memory():
    needed = [estimate_of(each).memory_bytes for each in (Recipe.RTN, Recipe.LWC, Recipe.DEFAULT)]

    assert needed == sorted(set(needed))
    weights = sum(each.weights for each in LLAMA_7B.linears_per_layer)
    # value, gradient, two moments and the best state; twins, the changed weight and the source
    assert needed[2] > (20 + 10 + 4 + 4) * weights


def test_second_order_rounding_takes_the_inputs_moments():
    plain = estimate_of(Recipe.FAST, ingredients=Ingredients(second_order=SecondOrder.NONE))

    # six matrices of the widest inputs
    assert estimate_of(Recipe.FAST).memory_bytes > plain.memory_bytes + 6 * 4 * 11008**2


@pytest.mark.parametrize("loss", ["own_input_loss", "cosine_loss"])
def test_outputs_of_the_own_inputs_are_one_more_chain(loss):
    own = estimate_of(Recipe.DEFAULT, ingredients=Ingredients(**{loss: 1.0}))

    assert own.chain_bytes == estimate_of(Recipe.DEFAULT).chain_bytes * 4 // 3


def test_an_epoch_is_a_forward_and_two_products_backward():
    tokens = 128 * 1024
    weights = sum(each.weights for each in LLAMA_7B.linears)

    one, three = (
        estimate_of(Recipe.DEFAULT, calibration={"epochs": each}).calibration_flops
        for each in (1, 3)
    )

    assert three - one == pytest.approx(2 * 3 * 2 * tokens * weights)


def test_recipes_that_train_nothing_take_no_more_for_more_epochs():
    one, three = (
        estimate_of(Recipe.FAST, calibration={"epochs": each}).calibration_flops for each in (1, 3)
    )

    assert one == three > estimate_of(Recipe.RTN).calibration_flops


def test_tuning_end_to_end_counts_its_epochs():
    without = estimate_of(Recipe.DEFAULT, ingredients=Ingredients(end_to_end=EndToEnd.NONE))
    weights = sum(each.weights for each in LLAMA_7B.linears)

    more = estimate_of(Recipe.DEFAULT).calibration_flops - without.calibration_flops

    # forward twice, since blocks are run again, and two products backward
    assert more > 4 * 4 * 2 * 128 * 1024 * weights


def test_experts_that_no_token_meets_cost_memory_and_no_arithmetic():
    fields = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 3072}
    mixtral = check_config(SMOLLM2_CONFIG | fields | {"model_type": "mixtral"})
    dense = check_config(SMOLLM2_CONFIG | {"intermediate_size": 6144})
    few = CalibrationSpec(samples=1, length=16)
    spec = QuantSpec(w_bits=4, recipe=Recipe.LWC, calibration=few)

    sparse, full = (estimate_bytes(each, spec, "cuda") for each in (mixtral, dense))

    assert sparse.memory_bytes > 2 * full.memory_bytes
    assert sparse.calibration_flops == full.calibration_flops
