"""What a checkpoint directory must be before it becomes an artifact."""

import hashlib
import json

import pytest

from engine.errors import CheckpointInvalid
from tests.artifact_files import save_artifact
from tests.contract.stores import RecordingStore
from worker.publish import store_artifact


@pytest.fixture
def store():
    return RecordingStore()


@pytest.fixture
def folder(tmp_path):
    return save_artifact(tmp_path / "out", shards=2)


def test_every_file_is_stored_and_the_manifest_comes_last(store, folder):
    stored = store_artifact(store, "art_1", folder)

    names = {path.name for path in folder.iterdir()}
    assert set(store.objects) == {f"art_1/{name}" for name in names}
    assert store.calls[-1] == ("put_file", "art_1/abq_manifest.json")
    assert {each.path for each in stored.files} == names
    assert stored.bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_the_digest_is_that_of_the_manifest(store, folder):
    stored = store_artifact(store, "art_1", folder)

    raw = (folder / "abq_manifest.json").read_bytes()
    assert stored.manifest_sha256 == hashlib.sha256(raw).hexdigest()
    assert stored.bits_per_weight == 3.375
    assert stored.summary == {k: v for k, v in json.loads(raw).items() if k != "files"}


def test_a_file_that_differs_from_its_hash_is_refused(store, folder):
    with (folder / "config.json").open("ab") as file:
        file.write(b" ")

    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        store_artifact(store, "art_1", folder)

    assert "art_1/abq_manifest.json" not in store.objects


@pytest.mark.parametrize("odd", ["extra.py", "sub/extra.txt"])
def test_a_file_that_is_not_listed_is_refused(store, folder, odd):
    (folder / odd).parent.mkdir(exist_ok=True)
    (folder / odd).write_bytes(b"x")

    with pytest.raises(CheckpointInvalid, match=odd):
        store_artifact(store, "art_1", folder)

    assert store.objects == {}


def test_a_missing_file_is_refused(store, folder):
    (folder / "config.json").unlink()

    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        store_artifact(store, "art_1", folder)


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_manifest_that_cannot_be_read_is_refused(store, folder, content):
    manifest = folder / "abq_manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)

    with pytest.raises(CheckpointInvalid, match="abq_manifest"):
        store_artifact(store, "art_1", folder)
