import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.evaluation import EvaluationStatus
from engine.checkpoint.manifest import (
    digest_of,
    read_manifest,
    record_evaluation,
    verify_directory,
)
from engine.checkpoint.reader import load_checkpoint
from engine.errors import CheckpointInvalid, UnsupportedModel
from engine.spec import LayerOverride, QuantSpec
from tests.unit.engine.evaluations import an_evaluation
from tests.unit.engine.quantized_models import REVISION, save_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path, "w3a8g32")[1]


def shard_of(directory):
    (path,) = directory.glob("model-*.safetensors")
    return path


def change_tensors(directory, change):
    path = shard_of(directory)
    tensors = load_file(path)
    change(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, path.name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_the_directory_is_a_hugging_face_model_with_a_manifest(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}

    assert names == {
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "abq_manifest.json",
    }  # fmt: skip


def test_the_config_says_how_to_read_the_tensors(tmp_path):
    spec = QuantSpec(
        w_bits=4,
        a_bits=8,
        kv_bits=8,
        overrides=(LayerOverride(pattern="*.0.mlp.down_proj", w_bits=16),),
    )
    directory = save_checkpoint(tmp_path, spec)[1]

    config = json.loads((directory / "config.json").read_text())

    assert config["quantization_config"] == {
        "quant_method": "abq",
        "checkpoint_format": "bitplane-v1",
        "w_bits": 4,
        "a_bits": 8,
        "q_bits": 16,
        "kv_bits": 8,
        "group_size": -1,
        "symmetric": False,
        "bit_balance": False,
        "half_step": False,
        "overrides": [
            {"pattern": "*.0.mlp.down_proj", "w_bits": 16, "a_bits": None, "group_size": None}
        ],
        "modules_to_not_convert": ["model.layers.0.mlp.down_proj", "lm_head"],
    }
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_tensors_have_the_canonical_names_types_and_shapes(checkpoint):
    tensors = load_file(shard_of(checkpoint))

    described = {
        name.removeprefix(Q_PROJ): (str(each.dtype), tuple(each.shape))
        for name, each in tensors.items()
        if name.startswith(Q_PROJ)
    }
    assert described == {
        ".weight_packed": ("torch.int32", (3, 64, 2)),
        ".weight_scale": ("torch.float16", (64, 2)),
        ".weight_zero_point": ("torch.uint8", (64, 2)),
        ".bias": ("torch.bfloat16", (64,)),
    }


@pytest.mark.parametrize(
    ("notation", "bits"),
    [
        ("w3a8", 3 + 24 / 64),
        ("w5a8g32", 5 + 24 / 32),
        ("w2*a8g64", 3 + 24 / 64),
        ("w1a16g32", 1 + 24 / 32),
    ],
)
def test_counted_bits_per_weight_are_the_promised_ones(tmp_path, notation, bits):
    summary = save_checkpoint(tmp_path, notation, intermediate_size=64)[2]

    assert summary.bits.per_weight == pytest.approx(bits, abs=1e-12)
    assert summary.bits.promised_per_weight == pytest.approx(bits, abs=1e-12)


def test_counted_bits_are_the_promised_ones_where_rows_end_inside_a_word(tmp_path):
    bits = save_checkpoint(tmp_path, "w3a16", intermediate_size=50)[2].bits

    assert bits.per_weight > 3 + 24 / 50
    assert bits.promised_per_weight == pytest.approx(bits.per_weight, abs=1e-12)


def test_every_stored_byte_is_counted_once(tmp_path):
    _, directory, summary = save_checkpoint(tmp_path, "w4a8")

    stored = sum(each.nbytes for each in load_file(shard_of(directory)).values())

    bits = summary.bits
    assert bits.packed_bytes + bits.other_bytes + bits.embedding_bytes == stored
    assert bits.embedding_bytes == 2 * 260 * 64 * 2
    assert bits.quantized_weights == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)


def test_shards_stay_below_the_limit_and_the_index_finds_every_tensor(tmp_path):
    twin, directory, _ = save_checkpoint(tmp_path, "w4a8", max_shard_bytes=40_000)

    shards = sorted(directory.glob("model-*.safetensors"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in shards for name in load_file(path)}

    assert [path.name for path in shards] == [
        f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)
    ]
    assert all(path.stat().st_size < 50_000 for path in shards)
    assert index["weight_map"] == held
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(load_checkpoint(directory).model(tokens).logits, twin(tokens).logits)


def test_equal_runs_write_equal_bytes(tmp_path):
    first = save_checkpoint(tmp_path / "a", "w3a8g32")[2]
    second = save_checkpoint(tmp_path / "b", "w3a8g32")[2]

    assert first == second
    assert digest_of(tmp_path / "a" / "checkpoint") == first.manifest_sha256


def test_a_left_over_partial_directory_and_an_old_result_are_replaced(tmp_path):
    partial = tmp_path / ".checkpoint.partial"
    partial.mkdir(parents=True)
    (partial / "rest").write_text("of an attempt that died")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "old").write_text("result")
    (tmp_path / "checkpoint" / "abq_manifest.json").write_text("{}")

    directory = save_checkpoint(tmp_path, "w4a8")[1]

    assert not partial.exists()
    assert not (directory / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint"}
    verify_directory(directory)


def test_a_writer_that_dies_leaves_no_directory(tmp_path, monkeypatch):
    def die(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", die)

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, "w4a8")
    assert not (tmp_path / "checkpoint").exists()


def test_the_manifest_says_what_was_done(checkpoint):
    manifest = read_manifest(checkpoint)

    assert manifest.source == {"repo": "tiny/model", "revision": REVISION}
    assert manifest.spec == QuantSpec.from_notation("w3a8g32")
    assert manifest.engine_version == "1.2.3"
    assert manifest.layers[0].loss_after == 0.125
    assert manifest.evaluation.status is EvaluationStatus.SKIPPED
    assert {each.path for each in manifest.files} == {
        path.name for path in checkpoint.iterdir() if path.name != "abq_manifest.json"
    }


def test_an_untouched_directory_verifies(checkpoint):
    assert verify_directory(checkpoint).spec.w_bits == 3


def test_one_flipped_bit_is_found_and_named(checkpoint):
    path = shard_of(checkpoint)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointInvalid, match=f"{path.name} differs from its sha256"):
        verify_directory(checkpoint)


def test_a_missing_file_is_named(checkpoint):
    (checkpoint / "tokenizer.json").unlink()

    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.json is missing"):
        verify_directory(checkpoint)


def test_a_cut_file_is_named(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")

    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.json has 2 bytes"):
        verify_directory(checkpoint)


@pytest.mark.parametrize("path", ["../config.json", "/etc/hostname", "a/b"])
def test_a_manifest_that_points_elsewhere_is_refused(checkpoint, path):
    record = json.loads((checkpoint / "abq_manifest.json").read_text())
    record["files"][0]["path"] = path
    (checkpoint / "abq_manifest.json").write_text(json.dumps(record))

    with pytest.raises(CheckpointInvalid, match="is no file name"):
        verify_directory(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "abq-manifest-v1"}', "[" * 100_000])
def test_a_damaged_manifest_is_refused(checkpoint, text):
    (checkpoint / "abq_manifest.json").write_text(text)

    with pytest.raises(CheckpointInvalid, match=r"abq_manifest\.json"):
        read_manifest(checkpoint)


def test_an_evaluation_is_added_without_touching_anything_else(checkpoint):
    before = read_manifest(checkpoint)
    measured = an_evaluation()

    digest = record_evaluation(checkpoint, measured)

    after = verify_directory(checkpoint)
    assert after.evaluation == measured
    assert (after.files, after.bits) == (before.files, before.bits)
    assert digest == digest_of(checkpoint)


def drop_scale(tensors):
    del tensors[f"{Q_PROJ}.weight_scale"]


def add_tensor(tensors):
    tensors["model.extra.weight"] = torch.zeros(1)


def cut_planes(tensors):
    tensors[f"{Q_PROJ}.weight_packed"] = tensors[f"{Q_PROJ}.weight_packed"][:2]


def widen_scale(tensors):
    tensors[f"{Q_PROJ}.weight_scale"] = tensors[f"{Q_PROJ}.weight_scale"].float()


def shrink_embedding(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100]


def integer_norm(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop_scale, rf"lacks the tensor {Q_PROJ}\.weight_scale"),
        (add_tensor, r"holds model\.extra\.weight"),
        (cut_planes, r"q_proj\.weight_packed has shape \(2, 64, 2\)"),
        (widen_scale, r"q_proj\.weight_scale is F32 instead of F16"),
        (shrink_embedding, r"embed_tokens\.weight has shape \(100, 64\)"),
        (integer_norm, r"model\.norm\.weight is I32"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(checkpoint, change, complaint):
    change_tensors(checkpoint, change)

    with pytest.raises(CheckpointInvalid, match=complaint):
        load_checkpoint(checkpoint)


def test_a_shard_that_is_no_safetensors_is_refused(checkpoint):
    shard_of(checkpoint).write_bytes(b"\x80\x04pickle")

    with pytest.raises(CheckpointInvalid, match="no readable"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({}, "no quantization_config of method abq"),
        ({"quant_method": "gptq"}, "no quantization_config of method abq"),
        ({"quant_method": "abq", "checkpoint_format": "v9"}, "checkpoint_format 'v9' is unknown"),
        (
            {"quant_method": "abq", "checkpoint_format": "bitplane-v1", "w_bits": 99},
            "w_bits = 99",
        ),
        (
            {"quant_method": "abq", "checkpoint_format": "bitplane-v1"},
            "quantization_config is not possible",
        ),
    ],
)
def test_a_config_of_another_format_is_refused(checkpoint, section, complaint):
    change_config(checkpoint, lambda config: config.update(quantization_config=section))

    with pytest.raises(CheckpointInvalid, match=complaint):
        load_checkpoint(checkpoint)


def test_absurd_sizes_are_refused_before_anything_is_allocated(checkpoint):
    change_config(checkpoint, lambda config: config.update(hidden_size=2**40))

    with pytest.raises(UnsupportedModel, match="hidden_size"):
        load_checkpoint(checkpoint)


def test_sizes_that_the_tensors_do_not_have_are_refused(checkpoint):
    change_config(checkpoint, lambda config: config.update(vocab_size=500_000))

    with pytest.raises(CheckpointInvalid, match="the config promises"):
        load_checkpoint(checkpoint)


def test_foreign_code_is_refused(checkpoint):
    change_config(checkpoint, lambda config: config.update(auto_map={"AutoModel": "x.Y"}))

    with pytest.raises(UnsupportedModel, match="auto_map"):
        load_checkpoint(checkpoint)


def test_a_group_that_does_not_divide_a_layer_is_refused(checkpoint):
    change_config(checkpoint, lambda config: config["quantization_config"].update(group_size=96))

    with pytest.raises(CheckpointInvalid, match="group_size 96 does not divide 64"):
        load_checkpoint(checkpoint)


def test_tied_embeddings_are_stored_and_held_once(tmp_path):
    directory = save_checkpoint(tmp_path, "w4a8", tie_word_embeddings=True)[1]

    model = load_checkpoint(directory).model

    assert "lm_head.weight" not in load_file(shard_of(directory))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_memory_counts_weights_and_derived_operands(checkpoint):
    loaded = load_checkpoint(checkpoint)

    parameters = sum(each.nbytes for each in loaded.model.parameters())
    packed = sum(each.nbytes for each in loaded.model.buffers())
    # on a CPU one byte a weight is derived for the integer product
    assert (
        loaded.memory_bytes
        == parameters + packed + read_manifest(checkpoint).bits.quantized_weights
    )
