import pytest

from api.cli.client import ApiClient
from api.cli.errors import CliError
from api.cli.transfer import fetch_files


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\..\\x", ""])
def test_a_path_out_of_the_folder_is_refused_before_anything_is_fetched(path, tmp_path):
    file = {"path": path, "bytes": 1, "sha256": "0" * 64, "url": "/x"}
    folder = tmp_path / "model"

    with ApiClient("http://127.0.0.1:1", None) as client, pytest.raises(CliError, match="outside"):
        fetch_files(client, [file], folder, workers=1, on_bytes=lambda _: None)

    assert not folder.exists()
