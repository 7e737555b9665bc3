import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from engine.architecture import check_config, kept_fields
from engine.errors import UnsupportedModel
from engine.models.loading import load_full_precision, read_config
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
