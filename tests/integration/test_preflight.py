"""What is refused before anything is queued: fast, by field and remedy, without reading weights."""

import json
import time

import pytest

from api.errors import (
    ConfigRejected,
    DiskTooSmall,
    HubUnavailable,
    InvalidRequest,
    ModelGated,
    ModelNotFound,
    ModelTooLarge,
    RevisionNotFound,
    ServiceError,
    UnsupportedFormat,
)
from api.hub.routing import create_hub
from api.services.preflight import preflight
from api.settings import HubSettings, LimitSettings, Settings
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec
from tests.fake_hub import STRANGER, WRITER, Trouble
from tests.hub_repository import Blob
from tests.model_files import (
    CONFIG,
    CONFIGS,
    model_files,
    safetensors_bytes,
    safetensors_header,
    tensor_shapes,
)
from tests.tiny_models import FAMILIES, TINY, save_tiny_model

W4A8 = QuantSpec.from_notation("w4a8")
LIMIT_S = 20.0
"""Within this a refusal must come."""
HEADER_BYTES = 100_000
"""So much of a weight file may be read to see its header."""
LARGE = CONFIG | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}

MIXTRAL = CONFIGS["mixtral"]


class Caller:
    """Asks for quantizations of one service."""

    def __init__(self, fake_hub, folder, *, token=None, **limits):
        self.settings = Settings(
            data_dir=folder / "data",
            hub=HubSettings(endpoint=fake_hub.url, token=token, text_roots={"texts": folder}),
            limits=LimitSettings(**limits),
        )
        self.hub = create_hub(self.settings)

    def ask(self, model="acme/tiny", revision=None, spec=W4A8, **options):
        return preflight(
            self.hub, self.settings, model=model, revision=revision, spec=spec, **options
        )

    def refusal(self, expected=ServiceError, **request):
        started = time.monotonic()
        with pytest.raises(expected) as refusal:
            self.ask(**request)
        assert time.monotonic() - started < LIMIT_S
        return refusal.value


@pytest.fixture
def caller(fake_hub, tmp_path):
    return Caller(fake_hub, tmp_path)


@pytest.fixture
def writer(fake_hub, tmp_path):
    return Caller(fake_hub, tmp_path, token=WRITER)


def large_model_files():
    shapes = tensor_shapes(LARGE) | {"lm_head.weight": [LARGE["vocab_size"], LARGE["hidden_size"]]}
    header, data_bytes = safetensors_header(shapes)
    blob = Blob(head=header, size=len(header) + data_bytes, digest="0" * 64)
    return model_files(CONFIG) | {
        "config.json": json.dumps(LARGE).encode(),
        "model.safetensors": blob,
    }


def test_a_good_request_gets_an_estimate_from_its_own_files(fake_hub, caller):
    files = model_files()
    fake_hub.add("acme/tiny", files)

    checked = caller.ask(spec=QuantSpec.from_notation("w4a8g64"))

    estimate = checked.estimate
    assert checked.resolved.sha == fake_hub.repositories["acme/tiny"].head
    assert checked.architecture.layers == estimate["layers"] == 2
    assert estimate["parameters"] == checked.architecture.parameter_count
    assert estimate["promised_bits_per_weight"] == pytest.approx(4 + 24 / 64)
    fetched = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "LICENSE", "model.safetensors")  # fmt: skip
    assert estimate["source_bytes"] == sum(len(files[name]) for name in fetched)
    assert estimate["artifact_bytes"] < estimate["source_bytes"]
    needed = estimate["source_bytes"] + 1.1 * estimate["artifact_bytes"]
    assert estimate["disk_needed_bytes"] > needed - 1
    assert estimate["disk_needed_bytes"] <= estimate["disk_free_bytes"]
    assert estimate["memory_needed_bytes"] > 0
    json.dumps(estimate)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_of_every_family_is_taken(fake_hub, caller, tmp_path, model_type):
    folder = save_tiny_model(tmp_path / "model", model_type)
    fake_hub.add("acme/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})

    short = CalibrationSpec(samples=8, length=128)
    checked = caller.ask(spec=QuantSpec(w_bits=4, calibration=short))

    linears = checked.architecture.linears
    assert checked.estimate["promised_bits_per_weight"] > 4
    assert len(linears) == 2 * TINY[model_type].linears


def test_experts_in_one_tensor_are_counted_and_measured(fake_hub, caller):
    shapes = tensor_shapes(MIXTRAL)
    apart = [name for name in shapes if ".experts." in name]
    plain = {name: shape for name, shape in shapes.items() if name not in apart}
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        plain |= {f"{module}.gate_up_proj": [4, 256, 64], f"{module}.down_proj": [4, 64, 128]}
    files = model_files(MIXTRAL) | {"model.safetensors": safetensors_bytes(plain)}
    fake_hub.add("acme/tiny", files)
    plain["model.layers.1.mlp.experts.down_proj"] = [4, 128, 64]
    fake_hub.add("acme/wrong", files | {"model.safetensors": safetensors_bytes(plain)})

    assert caller.ask().architecture.sizes.experts == 4
    refusal = caller.refusal(ConfigRejected, model="acme/wrong")
    assert "layers.1.mlp.experts.0.down_proj.weight of shape [64, 128]" in refusal.message


def test_no_weight_is_read_beyond_the_first_bytes_of_a_file(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())

    caller.ask()

    assert fake_hub.bytes_of("model.safetensors") <= HEADER_BYTES
    for never in ("pytorch_model.bin", "modeling_evil.py", "consolidated.safetensors"):
        assert fake_hub.bytes_of(never) == 0
    read = [each for each in fake_hub.requests if each.path.endswith(".safetensors")]
    assert [each.range for each in read] == [f"bytes=0-{HEADER_BYTES - 1}"]


def test_all_reads_are_of_the_pinned_commit(fake_hub, caller):
    repository = fake_hub.add("acme/tiny", model_files())
    repository.branches["dev"] = repository.head
    repository.commit({"config.json": b"{}"})

    checked = caller.ask(revision="dev")

    assert checked.resolved.sha == repository.branches["dev"]
    resolved = [path for path in fake_hub.paths() if "/resolve/" in path]
    assert resolved
    assert all(f"/resolve/{checked.resolved.sha}/" in path for path in resolved)


@pytest.mark.parametrize(
    "model",
    ["gpt2", "a/b/c", "https://huggingface.co/a/b", "/etc/passwd", "~/model", "../a/b", "a/../b",
     "a\\b/c", "a/b--c", "a/" + "b" * 100, "a/b.git", "a/b\n", "é/a", "", "a/", "/b", "a/.."],
)  # fmt: skip
def test_a_malformed_model_id_never_reaches_the_hub(fake_hub, caller, model):
    refusal = caller.refusal(InvalidRequest, model=model)

    assert refusal.param == "model"
    assert "owner/name" in refusal.message
    assert fake_hub.requests == []


def test_a_missing_repository_is_refused(caller):
    refusal = caller.refusal(ModelNotFound)

    assert (refusal.status, refusal.param) == (422, "model")


def test_a_private_repository_is_as_good_as_missing(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files(), private=True)

    assert caller.refusal(ModelNotFound).param == "model"


def test_a_missing_revision_is_refused(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())

    assert caller.refusal(RevisionNotFound, revision="v9").param == "revision"


@pytest.mark.parametrize("token", [None, STRANGER])
def test_a_gated_model_needs_a_token_with_access(fake_hub, tmp_path, token):
    fake_hub.add("acme/tiny", model_files(), gated=True)

    refusal = Caller(fake_hub, tmp_path, token=token).refusal(ModelGated)

    assert refusal.status == 403
    assert not any("/resolve/" in path for path in fake_hub.paths())


def test_a_gated_model_is_taken_with_access(fake_hub, writer):
    fake_hub.add("acme/tiny", model_files(), gated=True)

    assert writer.ask().resolved.gated


def without(name, files):
    return {path: content for path, content in files.items() if path != name}


HOSTILE = {
    "pickles_only": without("model.safetensors", model_files()),
    "auto_map": model_files(
        config__json=json.dumps(CONFIG | {"auto_map": {"AutoModel": "x.Y"}}).encode()
    ),
    "unsupported": model_files(
        config__json=json.dumps(CONFIG | {"model_type": "mamba"}).encode()
    ),
    "absurd": model_files(
        config__json=json.dumps(CONFIG | {"hidden_size": 10**9}).encode()
    ),
    "long_header": model_files(
        model__safetensors=Blob(head=(30_000_000).to_bytes(8, "little") + b"{", size=40_000_000)
    ),
    "traversal": model_files() | {
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"model.norm.weight": "../../x.safetensors"}}
        ).encode()
    },
    "large_config": model_files(config__json=b'{"a":"' + b"b" * 1_100_000 + b'"}'),
    "deep_config": model_files(config__json=b'{"a":' * 21 + b"1" + b"}" * 21),
    "already_quantized": model_files(
        config__json=json.dumps(CONFIG | {"quantization_config": {"quant_method": "x"}}).encode()
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused_before_its_weights(fake_hub, caller, kind):
    fake_hub.add("acme/tiny", HOSTILE[kind])

    refusal = caller.refusal((ConfigRejected, UnsupportedFormat))

    assert (refusal.status, refusal.param) == (422, "model")
    assert fake_hub.bytes_of(".safetensors") <= HEADER_BYTES
    assert fake_hub.bytes_of(".bin") == 0


def test_pickles_only_has_its_own_code(fake_hub, caller):
    fake_hub.add("acme/tiny", HOSTILE["pickles_only"])

    assert caller.refusal().code == "unsupported_format"


def test_a_config_that_promises_other_shapes_is_refused(fake_hub, caller):
    config = json.dumps(CONFIG | {"intermediate_size": 160}).encode()
    fake_hub.add("acme/tiny", model_files(config__json=config))

    refusal = caller.refusal(ConfigRejected)

    assert "mlp.gate_proj.weight of shape [160, 64]" in refusal.message
    assert "[128, 64]" in refusal.message


def test_a_parameter_count_off_by_more_than_one_percent_is_refused(fake_hub, caller):
    config = json.dumps(CONFIG | {"vocab_size": 9000}).encode()
    fake_hub.add("acme/tiny", model_files(config__json=config))

    assert "parameters" in caller.refusal(ConfigRejected).message


def test_a_tied_head_that_is_stored_twice_counts_once(fake_hub, caller):
    shapes = tensor_shapes(CONFIG) | {"lm_head.weight": [8192, 64]}
    header, size = safetensors_header(shapes)
    fake_hub.add("acme/tiny", model_files(model__safetensors=header + bytes(size)))

    assert caller.ask().estimate["parameters"] < 600_000


def test_weights_that_are_quantized_already_are_refused(fake_hub, caller):
    header, size = safetensors_header(tensor_shapes(CONFIG), "I8")
    fake_hub.add("acme/tiny", model_files(model__safetensors=header + bytes(size)))

    assert "I8" in caller.refusal(UnsupportedFormat).message


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())

    refusal = caller.refusal(InvalidRequest, spec=QuantSpec(w_bits=4, group_size=96))

    assert refusal.param == "spec.group_size"
    assert "K = 64" in refusal.message
    assert "32" in refusal.message


def test_an_override_that_matches_nothing_is_refused(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())
    spec = QuantSpec(w_bits=4, overrides=(LayerOverride(pattern="*.dwon_proj", w_bits=8),))

    assert caller.refusal(InvalidRequest, spec=spec).param == "spec.overrides[0].pattern"


def test_a_model_over_the_limits_is_refused(fake_hub, tmp_path):
    fake_hub.add("acme/tiny", large_model_files())

    by_count = Caller(fake_hub, tmp_path, max_parameters=10**9).refusal(ModelTooLarge)
    by_bytes = Caller(fake_hub, tmp_path, max_source_bytes=10**9).refusal(ModelTooLarge)

    assert "parameters" in by_count.message
    assert "bytes" in by_bytes.message


def test_a_disk_without_room_is_refused(fake_hub, tmp_path):
    fake_hub.add("acme/tiny", large_model_files())
    caller = Caller(fake_hub, tmp_path, max_source_bytes=10**13)

    refusal = caller.refusal(DiskTooSmall)

    assert refusal.status == 422
    assert "bytes of disk" in refusal.message
    assert fake_hub.bytes_of("model.safetensors") <= HEADER_BYTES


def test_the_reserve_of_the_disk_stays_free(fake_hub, tmp_path):
    fake_hub.add("acme/tiny", model_files())

    refusal = Caller(fake_hub, tmp_path, disk_reserve=1.0).refusal(DiskTooSmall)

    assert "reserve of 100%" in refusal.message


@pytest.mark.parametrize("name", ["local:texts/absent.txt", "local:other/a.txt", "local:../a"])
def test_a_missing_text_is_refused_by_its_field(fake_hub, caller, name):
    spec = QuantSpec(w_bits=4, calibration=CalibrationSpec(dataset=name))

    assert caller.refusal(InvalidRequest, spec=spec).param == "spec.calibration.dataset"
    by_evaluation = caller.refusal(InvalidRequest, evaluation={"dataset": name})
    assert by_evaluation.param == "evaluation.dataset"
    assert fake_hub.requests == []


def test_texts_of_the_hub_are_left_to_the_worker(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())
    spec = QuantSpec(w_bits=4, calibration=CalibrationSpec(dataset="c4", length=16))

    caller.ask(spec=spec, evaluation={"enabled": False, "datasets": ["wikitext2", "ptb"]})

    assert not any("datasets/" in path for path in fake_hub.paths())


def test_an_evaluation_beyond_the_models_positions_is_refused_by_its_field(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())

    refusal = caller.refusal(InvalidRequest, evaluation={"enabled": True, "length": 32768})

    assert refusal.param == "evaluation.length"
    assert "use at most that" in refusal.message


@pytest.mark.parametrize("repo_id", ["x", "a/b/c", "a/../b", "https://x/y", "a/b--c", ""])
def test_a_malformed_target_is_refused_before_the_hub_is_asked(fake_hub, writer, repo_id):
    refusal = writer.refusal(InvalidRequest, publish={"repo_id": repo_id, "private": True})

    assert refusal.param == "publish.repo_id"
    assert fake_hub.requests == []


def publish_refusal(fake_hub, caller, repo_id, *, private=True, **source):
    fake_hub.add("acme/tiny", model_files(), **source)
    refusal = caller.refusal(InvalidRequest, publish={"repo_id": repo_id, "private": private})
    assert not any("/resolve/" in path for path in fake_hub.paths())
    return refusal


def test_publishing_needs_a_token(fake_hub, caller):
    refusal = publish_refusal(fake_hub, caller, "acme/out")

    assert refusal.param == "publish.repo_id"
    assert "token" in refusal.message


def test_publishing_needs_rights_in_the_namespace(fake_hub, writer):
    refusal = publish_refusal(fake_hub, writer, "someone/out")

    assert refusal.param == "publish.repo_id"
    assert "acme-team" in refusal.message


def test_the_source_is_never_the_target(fake_hub, writer):
    assert "is the source" in publish_refusal(fake_hub, writer, "Acme/Tiny").message


def test_a_repository_with_other_contents_is_never_the_target(fake_hub, writer):
    fake_hub.add("acme/taken", model_files())

    assert "something else" in publish_refusal(fake_hub, writer, "acme/taken").message


def test_a_private_push_does_not_go_to_a_public_repository(fake_hub, writer):
    fake_hub.add("acme/open", {"README.md": b"hello"})

    assert publish_refusal(fake_hub, writer, "acme/open").param == "publish.private"


def test_a_gated_model_is_not_pushed_publicly(fake_hub, writer):
    refusal = publish_refusal(fake_hub, writer, "acme/out", private=False, gated=True)

    assert refusal.param == "publish.private"


def test_a_team_of_the_token_is_a_good_target(fake_hub, writer):
    fake_hub.add("acme/tiny", model_files())

    writer.ask(publish={"repo_id": "acme-team/out", "private": False})

    assert "acme-team/out" not in fake_hub.repositories


@pytest.mark.parametrize("trouble", [Trouble.DOWN, Trouble.BUSY])
def test_a_hub_that_recovers_is_not_noticed(fake_hub, caller, trouble):
    fake_hub.add("acme/tiny", model_files())
    for where in ("/api/models", "config.json", "model.safetensors"):
        fake_hub.inject(trouble, where, amount=0.1)

    assert caller.ask().resolved.sha


def test_a_hub_that_stays_down_is_told_within_the_limit(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())
    fake_hub.inject(Trouble.DOWN, "/api/models", times=100)

    refusal = caller.refusal(HubUnavailable)

    assert (refusal.status, refusal.param) == (503, None)


def test_a_busy_hub_says_when_to_come_back(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())
    fake_hub.inject(Trouble.BUSY, "/api/models", times=100, amount=120)

    refusal = caller.refusal(HubUnavailable)

    assert refusal.extra["retry_after_s"] == 120
    assert len(fake_hub.requests) == 1


def test_a_date_to_come_back_at_is_not_waited_for(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())
    fake_hub.inject(Trouble.BUSY, "/api/models", amount="Wed, 25 Nov 2026 07:28:00 GMT")

    assert caller.ask().resolved.sha


def test_a_hub_that_is_not_there_is_told_within_the_limit(fake_hub, tmp_path):
    caller = Caller(fake_hub, tmp_path)
    caller.settings = caller.settings.model_copy(
        update={"hub": HubSettings(endpoint="http://127.0.0.1:9")}
    )
    caller.hub = create_hub(caller.settings)

    assert "did not answer" in caller.refusal(HubUnavailable).message


def test_a_body_cut_short_is_read_again(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())
    fake_hub.inject(Trouble.TRUNCATED, "config.json", amount=10)

    assert caller.ask().architecture.layers == 2


def test_a_hub_that_ignores_ranges_is_understood(fake_hub, caller):
    fake_hub.add("acme/tiny", model_files())
    fake_hub.inject(Trouble.NO_RANGE, "model.safetensors")

    assert caller.ask().architecture.layers == 2


def test_an_implicit_token_of_the_machine_is_never_sent(fake_hub, caller, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    fake_hub.add("acme/tiny", model_files())

    caller.ask()

    assert {each.authorization for each in fake_hub.requests} == {None}


def test_preflight_leaves_nothing_on_disk(fake_hub, caller, tmp_path):
    fake_hub.add("acme/tiny", model_files())

    caller.ask()

    assert list(tmp_path.rglob("*")) == []
