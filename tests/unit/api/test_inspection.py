"""A stranger's files cannot crash the inspection, only be refused by it."""

import json

import numpy as np
import pytest

from api.errors import ServiceError
from api.hub.base import RemoteFile, ResolvedModel
from api.hub.inspection import inspect_model
from engine.families.registry import FAMILIES
from tests.model_files import CONFIGS, model_files

ALWAYS = ("auto_map", "quantization_config", "layer_types")


def fields_of(family):
    sizes = {getattr(family.size_fields, name) for name in family.size_fields.__slots__} - {None}
    return sorted({*family.fields, *sizes, *ALWAYS})


FIELDS = [(name, field) for name, family in FAMILIES.items() for field in fields_of(family)]
ODD = ([], {}, [[1]], [{}], "x", "x" * 900_000, -1, 0, 1e308, 10**4000, True, None, 2.5,
       {"rope_type": []}, {"type": {}}, ["full_attention", []], {"full_attention": [1]},
       {"partial_rotary_factor": None}, {"partial_rotary_factor": 1e9})  # fmt: skip


def inspect(files):
    resolved = ResolvedModel(
        model="acme/tiny",
        sha="a" * 40,
        files=tuple(RemoteFile(path=path, bytes=len(content)) for path, content in files.items()),
    )
    return inspect_model(resolved, lambda path, start, length: files[path][start : start + length])


def refusal_of(files):
    try:
        inspect(files)
    except ServiceError as refusal:
        return refusal
    return None


@pytest.mark.parametrize(("model_type", "field"), FIELDS)
def test_no_value_of_a_config_crashes_the_inspection(model_type, field):
    files = model_files()

    assert refusal_of(files | {"config.json": json.dumps(CONFIGS[model_type]).encode()}) is None
    for value in ODD:
        config = json.dumps(CONFIGS[model_type] | {field: value}).encode()
        refusal = refusal_of(files | {"config.json": config})
        assert refusal is None or (refusal.status == 422 and refusal.param == "model")
        assert refusal is None or len(refusal.message) < 1000


def test_no_model_type_crashes_the_inspection():
    for value in ODD:
        config = json.dumps(CONFIGS["llama"] | {"model_type": value}).encode()
        assert refusal_of(model_files() | {"config.json": config}).param == "model"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_no_broken_byte_crashes_the_inspection(name):
    files = model_files()
    generator = np.random.default_rng(0)

    refused = 0
    for _ in range(300):
        spoiled = bytearray(files[name])
        place = int(generator.integers(0, min(len(spoiled), 2000)))
        spoiled[place] = int(generator.integers(0, 256))
        refusal = refusal_of(files | {name: bytes(spoiled)})
        assert refusal is None or refusal.status == 422
        refused += refusal is not None

    assert refused > 30


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 2000])
def test_a_weight_file_cut_short_is_refused(keep):
    files = model_files()

    assert refusal_of(files | {"model.safetensors": files["model.safetensors"][:keep]}) is not None


@pytest.mark.parametrize(
    "index", [b"{}", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}',
              b'{"weight_map": {"a": []}}',
              b'{"weight_map": {"a": "b.safetensors"}}', b"{", b"null"],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_refused(index):
    refusal = refusal_of(model_files() | {"model.safetensors.index.json": index})

    assert refusal.status == 422


def test_a_model_without_config_is_refused():
    files = model_files()
    del files["config.json"]

    assert "config.json" in refusal_of(files).message


def test_a_tensor_in_two_shards_is_refused():
    files = model_files(shards=2)
    files["model-00002-of-00002.safetensors"] = files["model-00001-of-00002.safetensors"]
    index = json.loads(files["model.safetensors.index.json"])
    names = sorted(set(index["weight_map"]))
    index["weight_map"] = {
        name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)
    }
    files["model.safetensors.index.json"] = json.dumps(index).encode()

    assert "same name" in refusal_of(files).message


def test_headers_that_are_long_together_are_refused_unread():
    head = (20_000_000).to_bytes(8, "little") + b"{"
    names = [f"model-{index}.safetensors" for index in range(3)]
    index = json.dumps({"weight_map": {f"t{name}": name for name in names}}).encode()
    shards = dict.fromkeys(names, head + bytes(20_100_000))

    refusal = refusal_of(model_files() | shards | {"model.safetensors.index.json": index})

    assert "60000000 bytes" in refusal.message


def test_an_index_of_too_many_shards_is_refused():
    weight_map = {f"t{index}": f"model-{index}.safetensors" for index in range(513)}
    index = json.dumps({"weight_map": weight_map}).encode()

    refusal = refusal_of(model_files() | {"model.safetensors.index.json": index})

    assert "513 shards" in refusal.message


@pytest.mark.parametrize(
    ("name", "size"),
    [("tokenizer.json", 65 << 20), ("model.safetensors.index.json", 26_000_000),
     ("tokenizer_config.json", 1_000_001)],
)  # fmt: skip
def test_a_small_file_of_absurd_size_is_refused_unread(name, size):
    files = model_files() | {name: b"{}" + b" " * (size - 2)}

    refusal = refusal_of(files)

    assert name in refusal.message
    assert refusal.status == 422


def test_an_empty_license_list_is_no_problem():
    files = {path: content for path, content in model_files().items() if path != "LICENSE"}
    files["NOTICE.txt"] = b"notice"
    files["LICENSE-other file"] = b"x"

    fetched = {each.path for each in inspect(files).fetched_files}

    assert "NOTICE.txt" in fetched
    assert "LICENSE-other file" not in fetched


def test_a_model_may_go_without_tokenizer_config():
    files = model_files()
    del files["tokenizer_config.json"]

    assert inspect(files).architecture.layers == 2
