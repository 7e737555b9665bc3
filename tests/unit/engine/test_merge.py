import pytest
import torch

from engine.calibration.merge import merged_tensors
from engine.calibration.resume import BlockStore, SavedBlock, Tuning
from engine.errors import CheckpointInvalid
from engine.models.loading import SourceModel
from engine.models.rotated import rotated
from engine.rotation import Rotation
from tests.tiny_models import save_tiny_model

PREFIX = "model.layers.0."


@pytest.fixture
def source(tmp_path):
    return SourceModel.open(save_tiny_model(tmp_path / "source", layers=1))


def store_of(tmp_path, **tensors):
    store = BlockStore.open(tmp_path / "state", "mark")
    store.save(0, SavedBlock(tensors=tensors, loss_before=1.0, loss_after=0.5))
    return store


@pytest.mark.parametrize("seed", [None, 3])
def test_every_tensor_comes_once_and_a_saved_one_replaces_that_of_the_source(
    source, tmp_path, seed
):
    changed = {
        "input_layernorm.weight": torch.full((64,), 2.0),
        "mlp.down_proj.weight_packed": torch.full((4, 64, 4), 5, dtype=torch.int32),
        "mlp.down_proj.bias": torch.full((64,), 3.0),
        "mlp.up_proj.bias": torch.full((128,), 4.0),
    }
    store = store_of(tmp_path, **changed)
    model = rotated(source, Rotation(seed=seed, online_hadamard=False))

    merged = list(merged_tensors(source, store, model))

    names = [name for name, _ in merged]
    assert len(names) == len(set(names))
    # the weight beside packed codes is what was quantized; beside a bias alone it stays
    assert {*source.tensors.file_of} - {*names} == {f"{PREFIX}mlp.down_proj.weight"}
    for name, tensor in changed.items():
        assert torch.equal(dict(merged)[PREFIX + name], tensor)


def test_what_was_tuned_replaces_codes_scales_and_norms(source, tmp_path):
    packed = torch.full((4, 64, 4), 5, dtype=torch.int32)
    store = store_of(tmp_path, **{"mlp.down_proj.weight_packed": packed})
    tensors = {
        f"{PREFIX}mlp.down_proj.weight_packed": packed + 1,
        f"{PREFIX}input_layernorm.weight": torch.full((64,), 2.0),
    }
    store.save_tuned(Tuning(tensors=tensors, before=2.0, after=1.0))

    merged = dict(merged_tensors(source, store, source))

    for name, tensor in tensors.items():
        assert torch.equal(merged[name], tensor)
    assert store.load_tuned().record.divergence_after == 1


def test_what_a_rotation_changed_is_stored_in_the_sources_dtype(source, tmp_path):
    model = rotated(source, Rotation(seed=3, online_hadamard=False))

    merged = dict(merged_tensors(source, store_of(tmp_path, x=torch.zeros(1)), model))

    before = source.tensors.read([f"{PREFIX}mlp.up_proj.weight"])[f"{PREFIX}mlp.up_proj.weight"]
    after = merged[f"{PREFIX}mlp.up_proj.weight"]
    assert after.dtype == before.dtype == torch.bfloat16
    exact = model.load_block(0).mlp.up_proj.weight
    torch.testing.assert_close(after.float(), exact, rtol=2**-8, atol=0)
    assert not torch.allclose(after, before, atol=0.01)


def test_a_missing_block_is_named(source, tmp_path):
    store = BlockStore.open(tmp_path / "state", "mark")

    with pytest.raises(CheckpointInvalid, match=r"calibration of model\.layers\.0 is missing"):
        list(merged_tensors(source, store, source))
