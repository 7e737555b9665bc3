import errno
import math

import pytest
import torch
from safetensors import SafetensorError

from engine.calibration.resume import BlockStore, SavedBlock, Tuning, fingerprint
from engine.checkpoint.durable import save_tensors
from engine.models.loading import read_config
from engine.models.tensors import TensorFiles
from engine.spec import CalibrationSpec, QuantSpec
from tests.tiny_models import save_tiny_model

BLOCK = SavedBlock(
    tensors={"mlp.up_proj.weight_packed": torch.arange(6, dtype=torch.int32)},
    loss_before=2.0,
    loss_after=1.0,
)


def opened(folder, mark="a"):
    return BlockStore.open(folder / "state", mark)


def test_a_block_comes_back_as_it_was_saved(tmp_path):
    opened(tmp_path).save(3, BLOCK)

    found = opened(tmp_path).load(3)

    assert (found.loss_before, found.loss_after) == (2.0, 1.0)
    assert found.tensors.keys() == BLOCK.tensors.keys()
    assert torch.equal(found.tensors["mlp.up_proj.weight_packed"], torch.arange(6).int())


def test_a_block_that_was_never_saved_is_missing(tmp_path):
    assert opened(tmp_path).load(0) is None


def test_another_fingerprint_starts_afresh_and_says_so(tmp_path):
    opened(tmp_path, "a").save(0, BLOCK)

    other = opened(tmp_path, "b")

    assert other.was_stale
    assert other.load(0) is None
    # nor does the first one find its way back
    assert opened(tmp_path, "a").load(0) is None


def test_the_same_fingerprint_is_not_stale(tmp_path):
    assert not opened(tmp_path).was_stale
    opened(tmp_path).save(0, BLOCK)

    assert not opened(tmp_path).was_stale


def test_tensors_without_their_record_do_not_count(tmp_path):
    store = opened(tmp_path)
    store.save(0, BLOCK)

    (tmp_path / "state" / "block-00000.json").unlink()

    assert store.load(0) is None


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_torn_tensors_do_not_count(tmp_path, keep):
    store = opened(tmp_path)
    store.save(0, BLOCK)
    path = tmp_path / "state" / "block-00000.safetensors"

    path.write_bytes(path.read_bytes()[:keep])

    assert store.load(0) is None


def test_a_torn_record_does_not_count(tmp_path):
    store = opened(tmp_path)
    store.save(0, BLOCK)

    (tmp_path / "state" / "block-00000.json").write_text('{"sha256": ')

    assert store.load(0) is None


def test_a_full_disk_is_told_with_the_systems_number(tmp_path, monkeypatch):
    def fill(*_, **__):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("engine.checkpoint.durable.save_file", fill)

    with pytest.raises(OSError, match="No space left") as full:
        opened(tmp_path).save(3, BLOCK)

    assert full.value.errno == errno.ENOSPC
    assert opened(tmp_path).load(3) is None


def test_the_library_says_the_systems_number(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "missing" / "a.safetensors")


def test_a_last_stage_that_measured_nothing_is_run_again(tmp_path):
    store = opened(tmp_path)
    store.save_tuned(Tuning(tensors={}, before=math.nan, after=math.nan))

    assert store.load_tuned() is None


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def mark_of(folder, **changes):
    values = {
        "config": read_config(folder),
        "tokens": torch.arange(8).view(2, 4),
        "spec": QuantSpec(w_bits=4),
        "device": torch.device("cpu"),
        **changes,
    }
    return fingerprint(files=TensorFiles.open(folder), **values)


def test_equal_calibrations_have_equal_fingerprints(source):
    assert mark_of(source) == mark_of(source)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"model_type": "llama"}},
        {"tokens": torch.arange(1, 9).view(2, 4)},
        {"spec": QuantSpec(w_bits=3)},
        {"spec": QuantSpec(w_bits=4, calibration=CalibrationSpec(seed=1))},
        {"device": torch.device("cuda")},
    ],
    ids=["config", "tokens", "bits", "seed", "device"],
)
def test_every_part_of_a_calibration_counts(source, change):
    assert mark_of(source, **change) != mark_of(source)


def test_every_byte_of_the_weights_counts(source, tmp_path):
    other = save_tiny_model(tmp_path)
    raw = bytearray((other / "model.safetensors").read_bytes())
    assert mark_of(other) == mark_of(source)

    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)

    assert mark_of(other) != mark_of(source)
