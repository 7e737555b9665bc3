import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from engine.architecture import check_config, kept_fields
from engine.errors import UnsupportedModel
from engine.models.loading import (
    build_empty_model,
    build_model_config,
    load_full_precision,
    read_config,
)
from tests.tiny_models import FAMILIES, save_tiny_model

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_parameter_count_is_that_of_the_real_model(tmp_path, model_type):
    folder = save_tiny_model(tmp_path, model_type)

    architecture = check_config(read_config(folder))

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert architecture.parameter_count == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_linears_are_those_of_the_real_model(tmp_path, model_type):
    folder = save_tiny_model(tmp_path, model_type)

    architecture = check_config(read_config(folder))

    weights = load_full_precision(folder).state_dict()
    shapes = {
        f"{each.name}.weight": (each.out_features, each.in_features)
        for each in architecture.linears
    }
    norms_and_routers = {
        f"{architecture.layer_name(index)}.{name}": shape
        for index in range(architecture.layers)
        for name, shape in architecture.family.layer_tensors(
            architecture.sizes, architecture.fields
        ).items()
    }
    biases = {
        f"{each.name}.bias": (each.out_features,) for each in architecture.linears if each.has_bias
    }
    assert shapes | norms_and_routers | biases == {
        name: tuple(each.shape)
        for name, each in weights.items()
        if name.startswith(f"{architecture.family.layers}.")
    }


def test_key_value_heads_default_to_the_heads():
    assert check_config(SMALL).kv_heads == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("model_type", None),
        ("auto_map", {"AutoModel": "evil.py"}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("hidden_size", 10**9),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("hidden_size", None),
        ("hidden_size", 66),
        ("num_hidden_layers", 257),
        ("num_hidden_layers", 0),
        ("vocab_size", 2_000_000),
        ("num_attention_heads", 1024),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("intermediate_size", 10**7),
        ("max_position_embeddings", -1),
        ("hidden_act", "evil"),
        ("attention_bias", "yes"),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["full_attention", "chunked"]),
        ("rope_scaling", "linear"),
    ],
)
def test_a_config_outside_the_limits_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(UnsupportedModel) as refused:
        check_config({**SMALL, field: value})

    assert refused.value.field == field
    assert field in refused.value.message


FALCON = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
OTHERS = {
    "llama": SMALL,
    "mistral": {**SMALL, "model_type": "mistral"},
    "falcon": {**FALCON, "new_decoder_architecture": True},
    "gemma2": {**SMALL, "model_type": "gemma2"},
    "gemma3_text": {**SMALL, "model_type": "gemma3_text"},
    "phi3": {**SMALL, "model_type": "phi3"},
    "mixtral": {**SMALL, "model_type": "mixtral"},
    "opt": {
        **{name: size for name, size in SMALL.items() if name != "intermediate_size"},
        "model_type": "opt",
        "ffn_dim": 128,
    },
}


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("llama", "rms_norm_eps", -1),
        ("llama", "rope_theta", "high"),
        ("llama", "rope_theta", float("nan")),
        ("llama", "sliding_window", 0),
        ("llama", "eos_token_id", [1] * 65),
        ("llama", "eos_token_id", ["</s>"]),
        ("llama", "torch_dtype", "float8_e4m3fn"),
        ("opt", "ffn_dim", 10**7),
        ("opt", "word_embed_proj_dim", 0),
        ("opt", "activation_function", "evil"),
        ("opt", "layer_norm_elementwise_affine", False),
        ("opt", "hidden_size", 66),
        ("falcon", "num_ln_in_parallel_attn", 3),
        ("falcon", "ffn_hidden_size", "4h"),
        ("falcon", "hidden_size", "64"),
        ("falcon", "new_decoder_architecture", 1),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "attn_logit_softcapping", 0),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "sliding_window_pattern", 0),
        ("gemma3_text", "rope_local_base_freq", -1.0),
        ("phi3", "partial_rotary_factor", 2),
        ("phi3", "partial_rotary_factor", 0.45),
        ("mixtral", "num_local_experts", 10_000),
        ("mixtral", "num_experts_per_tok", 0),
    ],
)
def test_a_field_of_one_family_is_refused_by_its_name(model_type, field, value):
    check_config(OTHERS[model_type])

    with pytest.raises(UnsupportedModel) as refused:
        check_config({**OTHERS[model_type], field: value})

    assert refused.value.field == field
    assert field in refused.value.message


def test_the_multimodal_gemma_is_told_what_would_do():
    with pytest.raises(UnsupportedModel, match="gemma3_text"):
        check_config({**SMALL, "model_type": "gemma3"})


def test_rotary_parameters_of_each_kind_of_layer_are_checked():
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": None}
    check_config({**OTHERS["gemma3_text"], "rope_parameters": rope})
    with pytest.raises(UnsupportedModel, match=r"rope_parameters\.rope_type"):
        check_config({**SMALL, "rope_parameters": {**rope, "rope_type": "dynamic"}})
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": -1}

    with pytest.raises(UnsupportedModel, match=r"rope_parameters\.sliding_attention\.rope_theta"):
        check_config({**OTHERS["gemma3_text"], "rope_parameters": rope})


@pytest.mark.parametrize("model_type", ["falcon", "phi3"])
def test_code_that_transformers_has_built_in_since_is_not_asked_for(model_type):
    config = {**OTHERS[model_type], "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}

    assert "auto_map" not in kept_fields(config)


def test_a_window_that_is_null_is_no_window():
    config = {**OTHERS["mistral"], "sliding_window": None}

    assert build_model_config(config).sliding_window is None
    assert build_model_config(OTHERS["mistral"]).sliding_window is not None


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def test_longrope_is_taken_within_the_original_positions():
    config = {
        **OTHERS["phi3"],
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": LONGROPE,
    }

    assert check_config(config).max_positions == 4096
    # their ratio scales the attention
    assert kept_fields(config)["max_position_embeddings"] == 131_072
    assert check_config({**config, "rope_scaling": None}).max_positions == 131_072


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("short_factor", [1.0] * 7),
        ("short_factor", None),
        ("long_factor", [0.0] * 8),
        ("long_factor", 4.0),
        ("type", "su"),
    ],
)
def test_longrope_with_other_factors_is_refused(name, value):
    with pytest.raises(UnsupportedModel, match="rope_scaling"):
        check_config({**OTHERS["phi3"], "rope_scaling": {**LONGROPE, name: value}})


def test_a_token_visits_few_experts():
    experts = check_config({**OTHERS["mixtral"], "num_local_experts": 4, "num_experts_per_tok": 1})
    dense = check_config(OTHERS["mistral"])

    assert experts.active_weights_per_layer == dense.active_weights_per_layer
    assert sum(each.weights for each in experts.linears_per_layer) > dense.active_weights_per_layer


def test_layers_cannot_slide_without_a_window():
    kinds = ["full_attention", "sliding_attention"]
    check_config({**OTHERS["mistral"], "layer_types": kinds})

    with pytest.raises(UnsupportedModel, match="sliding_window = None"):
        check_config({**OTHERS["mistral"], "layer_types": kinds, "sliding_window": None})


def test_falcon_settles_what_its_class_ignores():
    multi_query = kept_fields({**FALCON, "num_kv_heads": 4})
    new = kept_fields(
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "parallel_attn": False}
    )

    assert (multi_query["num_kv_heads"], multi_query["ffn_hidden_size"]) == (1, 256)
    assert (new["num_kv_heads"], new["parallel_attn"]) == (2, True)


def test_a_padding_beyond_the_vocabulary_breaks_nothing():
    model = build_empty_model({**SMALL, "pad_token_id": 32_000})

    assert model.get_submodule("model.embed_tokens").padding_idx is None


def test_positions_that_depend_on_the_request_are_refused():
    with pytest.raises(UnsupportedModel, match=r"rope_scaling\.rope_type"):
        check_config({**SMALL, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})


def test_fields_that_no_class_needs_are_dropped():
    config = {**SMALL, "_attn_implementation_internal": "evil/repo", "custom_pipelines": {}}

    kept = kept_fields(config)

    assert set(kept) == {*SMALL, "num_key_value_heads", "head_dim", "max_position_embeddings"}


def test_kept_fields_build_the_config_that_was_saved(tmp_path):
    folder = save_tiny_model(
        tmp_path, "mistral", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )

    kept = kept_fields(read_config(folder))

    saved = AutoConfig.from_pretrained(folder)
    assert kept["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert kept["sliding_window"] == saved.sliding_window
