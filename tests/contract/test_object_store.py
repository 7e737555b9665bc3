"""What every `ObjectStore` does."""

import pytest

from api.errors import FileNotInArtifact
from api.storage.base import ObjectStore
from api.storage.local import LocalStore
from tests.contract.stores import RecordingStore


@pytest.fixture(params=["local", "recording"])
def store(request, tmp_path) -> ObjectStore:
    return LocalStore(tmp_path / "store") if request.param == "local" else RecordingStore()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.bin"
    path.write_bytes(b"weights")
    return path


def read(store, key):
    with store.open(key) as content:
        return content.read()


def test_a_kept_file_reads_back(store, source):
    store.put_file("art_1/config.json", source)

    assert store.exists("art_1/config.json")
    assert read(store, "art_1/config.json") == b"weights"
    assert store.path_of("art_1/config.json").read_bytes() == b"weights"


def test_an_object_outlives_the_file_it_came_from(store, source):
    store.put_file("art_1/a", source)

    source.unlink()
    source.write_bytes(b"other")

    assert read(store, "art_1/a") == b"weights"


def test_keeping_a_file_again_replaces_it(store, source, tmp_path):
    store.put_file("art_1/a", source)
    store.put_file("art_1/a", source)
    newer = tmp_path / "newer"
    newer.write_bytes(b"newer")

    store.put_file("art_1/a", newer)

    assert read(store, "art_1/a") == b"newer"


def test_a_missing_object_is_said_to_be_missing(store):
    assert not store.exists("art_1/a")
    with pytest.raises(FileNotInArtifact):
        store.open("art_1/a")
    with pytest.raises(FileNotInArtifact):
        store.path_of("art_1/a")


def test_a_folder_is_no_object(store, source):
    store.put_file("art_1/a", source)

    assert not store.exists("art_1")
    with pytest.raises(FileNotInArtifact):
        store.path_of("art_1")


def test_deleting_an_artifact_leaves_its_neighbours(store, source):
    for key in ("art_1/a", "art_1/sub/b", "art_10/a"):
        store.put_file(key, source)

    store.delete("art_1")
    store.delete("art_1")

    assert not store.exists("art_1/a")
    assert not store.exists("art_1/sub/b")
    assert store.exists("art_10/a")


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../a", "art/../../a", "art//a", "art/.hidden", ".incoming/x", "a\\b",
     "a/b\0", "a/b\n", "é/a", "/".join("a" * 11), "a" * 300],
)  # fmt: skip
def test_a_key_cannot_lead_elsewhere(store, source, key):
    for call in (store.open, store.path_of, store.exists, store.delete):
        with pytest.raises(ValueError, match="is no key"):
            call(key)
    with pytest.raises(ValueError, match="is no key"):
        store.put_file(key, source)
