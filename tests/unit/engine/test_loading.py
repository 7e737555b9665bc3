import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.calibration.capture import capture_inputs
from engine.errors import CheckpointInvalid, UnsupportedModel
from engine.models.blocks import ResidentModel
from engine.models.loading import (
    SourceModel,
    build_empty_model,
    build_model_config,
    load_full_precision,
    read_config,
)
from tests.tiny_models import FAMILIES, load_reference, save_tiny_model

TOKENS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))


def run_blocks(model, tokens):
    inputs = capture_inputs(model, tokens)
    hidden = inputs.hidden
    for index, call in enumerate(inputs.calls):
        block = model.load_block(index)
        hidden = torch.cat([call.run(block, each[None]) for each in hidden])
    return model.load_head()(hidden)


def separated(weights):
    """Take fused experts apart, as the engine keeps them."""
    apart = {}
    for name, each in weights.items():
        if each.dim() != 3:
            apart[name] = each
            continue
        module, _, fused = name.rpartition(".")
        for number, expert in enumerate(each):
            parts = {"down_proj": expert}
            if fused == "gate_up_proj":
                gate, up = expert.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            apart |= {f"{module}.{number}.{key}.weight": part for key, part in parts.items()}
    return apart


@pytest.mark.parametrize("model_type", FAMILIES)
def test_block_by_block_equals_the_whole_model(tmp_path, model_type):
    folder = save_tiny_model(tmp_path, model_type)
    reference = load_reference(folder, model_type)

    with torch.no_grad():
        logits = run_blocks(SourceModel.open(folder), TOKENS)
        wanted = reference(TOKENS).logits

    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_whole_load_equals_the_librarys_own(tmp_path, model_type):
    folder = save_tiny_model(tmp_path, model_type)

    loaded = load_full_precision(folder).state_dict()

    reference = separated(load_reference(folder, model_type).state_dict())
    assert loaded.keys() == reference.keys()
    assert all(torch.equal(each, reference[name]) for name, each in loaded.items())


def test_a_model_in_memory_gives_the_same_blocks_and_keeps_its_layers(tmp_path):
    folder = save_tiny_model(tmp_path, "qwen2")
    source = SourceModel.open(folder)
    resident = ResidentModel(architecture=source.architecture, skeleton=load_full_precision(folder))

    with torch.no_grad():
        seen = run_blocks(resident, TOKENS)
        again = resident.skeleton(TOKENS).logits

    assert torch.equal(seen, run_blocks(source, TOKENS))
    torch.testing.assert_close(seen, again, rtol=1e-5, atol=1e-5)


def test_keys_and_values_are_rounded_when_asked(tmp_path):
    source = SourceModel.open(save_tiny_model(tmp_path))
    inputs = capture_inputs(source, TOKENS)
    block = source.load_block(0)

    plain = inputs.calls[0].run(block, inputs.hidden)
    fine = inputs.calls[0].run(block, inputs.hidden, kv_bits=8)
    coarse = inputs.calls[0].run(block, inputs.hidden, kv_bits=2)

    assert 0 < (fine - plain).abs().max() < (coarse - plain).abs().max()


def test_a_missing_tensor_is_named_before_any_weight_is_read(tmp_path):
    folder = save_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(CheckpointInvalid, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        SourceModel.open(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_tensor_of_another_shape_is_named_before_any_weight_is_read(tmp_path, name):
    folder = save_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.zeros(100, 64)
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(CheckpointInvalid, match=rf"{name} has shape \(100, 64\), the config"):
        SourceModel.open(folder)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_weights_that_are_no_plain_floats_are_refused(tmp_path, dtype, said):
    folder = save_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(CheckpointInvalid, match=f"{name} is {said}; store it as one of F32"):
        SourceModel.open(folder)


def test_a_tensor_that_the_index_promises_and_no_file_has_is_named(tmp_path):
    folder = save_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(CheckpointInvalid, match=r"lacks the tensor .*1\.mlp\.up_proj\.weight"):
        SourceModel.open(folder)


def test_a_model_with_pickles_only_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(UnsupportedModel, match="no safetensors"):
        SourceModel.open(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "model.bin", "/etc/passwd"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, name):
    folder = save_tiny_model(tmp_path)
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointInvalid, match="no file of the model"):
        SourceModel.open(folder)


def test_broken_weights_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x80\x04junk")

    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors"):
        SourceModel.open(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"not json",
        b"\xff",
        b'{"a":' * 25 + b"1" + b"}" * 25,
        b"[" * 100_000,
        b'{"pad": "' + b"x" * 1_000_000 + b'"}',
    ],
)
def test_a_config_that_is_no_small_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(UnsupportedModel) as refused:
        read_config(tmp_path)

    assert refused.value.field == "config.json"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ('{"foo": NaN}', "foo"),
        ('{"foo": {"bar": [1.0, -Infinity]}}', "foo.bar.1"),
        ('{"foo": 1e999}', "foo"),
    ],
)
def test_a_number_that_is_not_finite_is_named_though_nobody_asks_for_it(tmp_path, content, field):
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(UnsupportedModel, match=f"{field} of config.json") as refused:
        read_config(tmp_path)

    assert refused.value.field == field


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("gemma2", "final_logit_softcapping", 30),
        ("gemma2", "attn_logit_softcapping", 50),
        ("gemma3_text", "rope_local_base_freq", 10_000),
        ("llama", "rms_norm_eps", 0),
        ("llama", "rope_theta", 10_000),
        ("opt", "init_std", 1),
        ("falcon-rw", "layer_norm_epsilon", 0),
    ],
)
def test_a_whole_number_is_a_float_where_the_class_wants_one(tmp_path, model_type, name, value):
    config = read_config(save_tiny_model(tmp_path, model_type))

    whole = build_model_config({**config, name: value})

    assert whole.to_dict() == build_model_config({**config, name: float(value)}).to_dict()


def test_what_the_library_refuses_in_its_own_way_is_refused(tmp_path, monkeypatch):
    class OfTheLibrary(Exception):
        pass

    def refuse(**_):
        raise OfTheLibrary("of a wrong type")

    config = read_config(save_tiny_model(tmp_path))
    library = SimpleNamespace(LlamaConfig=refuse)
    monkeypatch.setattr("engine.models.loading.transformers", library)

    with pytest.raises(UnsupportedModel, match="not consistent: of a wrong type"):
        build_model_config(config)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        read_config(tmp_path)


def test_a_config_cannot_choose_the_attention_code(tmp_path):
    fields = read_config(save_tiny_model(tmp_path))

    built = build_model_config(
        {**fields, "attn_implementation": "evil/repo", "_attn_implementation_internal": "evil/repo"}
    )

    assert built.to_dict().get("attn_implementation") is None
    assert built._attn_implementation == "sdpa"  # noqa: SLF001  it has no public name


def test_an_empty_model_takes_no_memory(tmp_path):
    model = build_empty_model(read_config(save_tiny_model(tmp_path)))

    assert all(each.is_meta for each in model.parameters())
    assert not any(each.is_meta for each in model.buffers())
