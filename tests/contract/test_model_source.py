"""What every `ModelSource` does: the Hugging Face client on a fake Hub, and local folders."""

import json

import pytest

from api.errors import (
    ConfigRejected,
    InvalidRequest,
    ModelNotFound,
    RevisionNotFound,
    UnsupportedFormat,
)
from api.hub.routing import create_hub
from api.settings import HubSettings, Settings
from tests.model_files import CONFIG, model_files, safetensors_bytes, tensor_shapes

FETCHED = [
    "LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip


class Source:
    """One implementation, and how a test puts a model there."""

    def __init__(self, kind, fake_hub, root):
        self.kind, self.fake_hub, self.root = kind, fake_hub, root
        hub = HubSettings(endpoint=fake_hub.url, model_roots={"models": root})
        self.hub = create_hub(Settings(data_dir=root.parent / "data", hub=hub))
        self.model = "acme/tiny" if kind == "remote" else "local:models/tiny"
        self.absent = "acme/absent" if kind == "remote" else "local:models/absent"

    def put(self, files):
        if self.kind == "remote":
            self.fake_hub.add(self.model, files)
            return
        folder = self.root / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            (folder / path).write_bytes(content)


@pytest.fixture(params=["remote", "local"])
def source(request, fake_hub, tmp_path):
    return Source(request.param, fake_hub, tmp_path / "models")


def ignore(done, total):
    """Take progress and do nothing."""


def test_a_model_is_pinned_to_a_revision_that_resolves_to_itself(source):
    source.put(model_files())

    resolved = source.hub.resolve(source.model, None)

    assert len(resolved.sha) == 40
    assert source.hub.resolve(source.model, resolved.sha) == resolved
    assert resolved.find_file("config.json").bytes == len(model_files()["config.json"])


def test_a_changed_model_is_another_revision(source):
    source.put(model_files())
    before = source.hub.resolve(source.model, None)
    source.put(model_files(CONFIG | {"rms_norm_eps": 1e-6}))

    after = source.hub.resolve(source.model, None)

    assert after.sha != before.sha


def test_facts_come_from_config_and_headers(source):
    source.put(model_files())

    facts = source.hub.inspect(source.hub.resolve(source.model, None))

    shapes = tensor_shapes(CONFIG)
    assert facts.config == CONFIG
    assert {name: list(each.shape) for name, each in facts.tensors.items()} == shapes
    assert facts.dtypes == ("BF16",)
    assert facts.weight_bytes == len(model_files()["model.safetensors"])
    assert [each.path for each in facts.weight_files] == ["model.safetensors"]


def test_only_allow_listed_files_arrive_and_they_are_intact(source, tmp_path):
    files = model_files()
    source.put(files)
    resolved = source.hub.resolve(source.model, None)

    source.hub.download(resolved, tmp_path / "target", ignore)

    arrived = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    assert arrived == {name: files[name] for name in FETCHED}


def test_only_the_shards_of_the_index_are_fetched(source, tmp_path):
    source.put(model_files(shards=3) | {"model.safetensors": b"a full second copy"})
    resolved = source.hub.resolve(source.model, None)

    source.hub.download(resolved, tmp_path / "target", ignore)

    names = {path.name for path in (tmp_path / "target").glob("*.safetensors")}
    assert names == {f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)}


def test_progress_ends_at_the_total(source, tmp_path):
    source.put(model_files())
    resolved = source.hub.resolve(source.model, None)
    seen = []

    source.hub.download(resolved, tmp_path / "target", lambda *counts: seen.append(counts))

    total = sum(path.stat().st_size for path in (tmp_path / "target").iterdir())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_an_exception_from_progress_stops_the_download(source, tmp_path):
    source.put(model_files())
    resolved = source.hub.resolve(source.model, None)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.hub.download(resolved, tmp_path / "target", stop)


def test_a_finished_download_is_not_repeated(source, tmp_path):
    source.put(model_files())
    resolved = source.hub.resolve(source.model, None)
    source.hub.download(resolved, tmp_path / "target", ignore)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "target").iterdir()}

    source.hub.download(resolved, tmp_path / "target", ignore)

    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "target").iterdir()} == first


def test_a_missing_model_is_said_to_be_missing(source):
    with pytest.raises(ModelNotFound) as refusal:
        source.hub.resolve(source.absent, None)

    assert refusal.value.param == "model"


@pytest.mark.parametrize("revision", ["nothing-of-this-name", "0" * 40])
def test_a_missing_revision_is_said_to_be_missing(source, revision):
    source.put(model_files())

    with pytest.raises(RevisionNotFound) as refusal:
        source.hub.resolve(source.model, revision)

    assert refusal.value.param == "revision"


@pytest.mark.parametrize("revision", ["a..b", "../main", "main?x", " ", "a" * 101, "-x"])
def test_a_malformed_revision_is_refused(source, revision):
    source.put(model_files())

    with pytest.raises(InvalidRequest) as refusal:
        source.hub.resolve(source.model, revision)

    assert refusal.value.param == "revision"


def refusal_of(source, files):
    source.put(files)
    with pytest.raises((UnsupportedFormat, ConfigRejected)) as refusal:
        source.hub.inspect(source.hub.resolve(source.model, None))
    assert refusal.value.param == "model"
    return refusal.value


def test_pickles_alone_are_no_weights(source):
    files = model_files()
    del files["model.safetensors"]

    refusal = refusal_of(source, files)

    assert isinstance(refusal, UnsupportedFormat)
    assert "pytorch_model.bin" in refusal.message
    assert "save_pretrained" in refusal.message


def test_a_config_that_names_code_is_refused(source):
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}

    refusal = refusal_of(source, model_files() | {"config.json": json.dumps(config).encode()})

    assert "auto_map" in refusal.message


def test_a_tokenizer_that_names_code_is_refused(source):
    files = model_files(tokenizer_config__json=b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')

    assert "tokenizer_config.json" in refusal_of(source, files).message


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 10**9), ("num_hidden_layers", 10**6), ("model_type", "gpt_bigcode"),
     ("vocab_size", -1), ("num_attention_heads", "four"), ("hidden_size", None)],
)  # fmt: skip
def test_an_absurd_config_is_refused_by_its_field(source, field, value):
    config = json.dumps(CONFIG | {field: value}).encode()

    refusal = refusal_of(source, model_files() | {"config.json": config})

    assert field in refusal.message
    assert refusal.extra["config_field"] == field


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps(CONFIG | {"x": "y" * 1_000_000}).encode(), "1000000 bytes"),
        (b'{"x":' * 30 + b"1" + b"}" * 30, "nested"),
        (b"[" * 200_000 + b"]" * 200_000, "nested"),
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "no JSON"),
    ],
)
def test_a_config_bomb_is_refused(source, content, what):
    assert what in refusal_of(source, model_files() | {"config.json": content}).message


def test_a_model_without_a_fast_tokenizer_is_refused(source):
    files = model_files()
    del files["tokenizer.json"]

    assert "tokenizer.json" in refusal_of(source, files).message


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd.safetensors", "sub/model.safetensors", "/x.safetensors", "x.bin",
              ".safetensors", 7, "a..safetensors/../x.safetensors"],
)  # fmt: skip
def test_an_index_cannot_name_a_path(source, shard):
    index = {"weight_map": {"model.norm.weight": shard}}
    files = model_files() | {"model.safetensors.index.json": json.dumps(index).encode()}

    assert "is no shard name" in refusal_of(source, files).message


def test_an_index_that_names_an_absent_shard_is_refused(source):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    files = model_files() | {"model.safetensors.index.json": json.dumps(index).encode()}

    assert "model-00001-of-00002.safetensors" in refusal_of(source, files).message


def test_an_index_that_contradicts_the_headers_is_refused(source):
    files = model_files(shards=2)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()

    assert "different tensors" in refusal_of(source, files).message


def test_a_header_of_thirty_megabytes_is_refused(source):
    head = (30_000_000).to_bytes(8, "little") + b"{"
    files = model_files(model__safetensors=head + b" " * 200_000)

    assert "30000000" in refusal_of(source, files).message


def test_a_long_header_is_read_to_its_end(source):
    shapes = tensor_shapes(CONFIG) | {f"buffer.{index:0200d}": [1] for index in range(600)}
    source.put(model_files(model__safetensors=safetensors_bytes(shapes)))

    facts = source.hub.inspect(source.hub.resolve(source.model, None))

    assert len(facts.tensors) == len(shapes)
