"""What is special about the store on a file system."""

import errno
import os
from pathlib import Path

import pytest

from api.errors import FileNotInArtifact
from api.settings import Settings, StorageSettings
from api.storage.local import LocalStore, create_store


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.bin"
    path.write_bytes(b"weights")
    return path


def test_the_store_of_the_settings_lies_where_they_say(tmp_path, source):
    store = create_store(Settings(storage=StorageSettings(root=tmp_path / "shared")))

    store.put_file("art_1/a", source)

    assert (tmp_path / "shared" / "art_1" / "a").read_bytes() == b"weights"


def test_a_link_below_the_root_does_not_lead_out_of_it(tmp_path, source):
    store = LocalStore(tmp_path / "store")
    store.put_file("art_1/a", source)
    (tmp_path / "store" / "art_1" / "secret").symlink_to("/etc/passwd")

    with pytest.raises(FileNotInArtifact):
        store.open("art_1/secret")


def test_nothing_is_left_behind_when_a_file_cannot_be_read(tmp_path):
    store = LocalStore(tmp_path / "store")

    with pytest.raises(FileNotFoundError):
        store.put_file("art_1/a", tmp_path / "absent")

    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    assert not store.exists("art_1/a")


def test_a_file_of_another_file_system_is_copied(tmp_path, source, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store = LocalStore(tmp_path / "store")

    store.put_file("art_1/a", source)

    assert store.path_of("art_1/a").read_bytes() == b"weights"
    assert store.path_of("art_1/a").stat().st_ino != source.stat().st_ino


def test_a_kept_file_takes_no_second_space(tmp_path, source):
    store = LocalStore(tmp_path / "store")

    store.put_file("art_1/a", source)

    assert store.path_of("art_1/a").stat().st_ino == source.stat().st_ino
    assert list((tmp_path / "store" / ".incoming").iterdir()) == []
