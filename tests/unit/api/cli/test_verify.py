import hashlib
import json

import pytest

from api.cli.errors import CliError
from api.cli.verify import MANIFEST_FILE, count_stored_bits, verify_folder


def write_tensors(path, sizes):
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, size in sizes.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


@pytest.fixture
def digest(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    file = {"path": "config.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    manifest = json.dumps({"files": [file]}).encode()
    (tmp_path / MANIFEST_FILE).write_bytes(manifest)
    return hashlib.sha256(manifest).hexdigest()


def test_a_complete_folder_is_right(tmp_path, digest):
    assert verify_folder(tmp_path, digest)["files"][0]["path"] == "config.json"


def test_a_changed_manifest_is_found(tmp_path, digest):
    path = tmp_path / MANIFEST_FILE
    path.write_bytes(path.read_bytes() + b" ")

    with pytest.raises(CliError, match="not the manifest"):
        verify_folder(tmp_path, digest)


def test_a_changed_file_of_the_same_size_is_found(tmp_path, digest):
    (tmp_path / "config.json").write_bytes(b"[]")

    with pytest.raises(CliError, match="another sha256"):
        verify_folder(tmp_path, digest)


def test_a_missing_file_is_found(tmp_path, digest):
    (tmp_path / "config.json").unlink()

    with pytest.raises(CliError, match="missing"):
        verify_folder(tmp_path, digest)


def test_bits_are_counted_over_all_shards_and_parts(tmp_path):
    layer = {"a.weight_packed": 400, "a.weight_scale": 20, "a.weight_zero_point": 10}
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", layer)
    others = {"b.weight_packed": 400, "b.weight_scale": 20, "b.weight_zero_point": 10}
    write_tensors(
        tmp_path / "model-00002-of-00002.safetensors", {**others, "embed_tokens.weight": 999}
    )

    stored = count_stored_bits(tmp_path, weights=1720)

    assert stored.per_weight == (430 + 430) * 8 / 1720


def test_a_folder_without_packed_layers_has_no_bits(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"embed_tokens.weight": 10})

    with pytest.raises(CliError, match="no quantized weights"):
        count_stored_bits(tmp_path, weights=10)
