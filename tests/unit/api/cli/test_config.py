import stat

import pytest

from api.cli.config import CLIENT_FILE, ClientConfig, read_client_config, write_client_config
from api.cli.connection import Connection
from api.cli.errors import CliError

LEFT = ClientConfig(url="http://127.0.0.1:9000", api_key="abq_live_x")


def connect(data_dir, url=None, key=None):
    return Connection(url=url, api_key=key, data_dir=data_dir).address_and_key()


def test_what_was_written_is_read(tmp_path):
    write_client_config(tmp_path, LEFT)

    assert read_client_config(tmp_path) == LEFT


def test_only_the_owner_can_read_the_key(tmp_path):
    path = write_client_config(tmp_path, LEFT)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_shell_on_the_machine_needs_no_set_up(tmp_path):
    write_client_config(tmp_path, LEFT)

    assert connect(tmp_path) == (LEFT.url, LEFT.api_key)


def test_options_win_over_the_file(tmp_path):
    write_client_config(tmp_path, LEFT)

    assert connect(tmp_path, "http://other", "key") == ("http://other", "key")


def test_a_key_is_never_sent_to_another_service(tmp_path):
    write_client_config(tmp_path, LEFT)

    assert connect(tmp_path, "http://other") == ("http://other", None)


def test_without_a_file_the_default_address_is_asked(tmp_path):
    assert connect(tmp_path) == ("http://127.0.0.1:8000", None)


def test_a_spoilt_file_is_named(tmp_path):
    (tmp_path / CLIENT_FILE).write_text("[]")

    with pytest.raises(CliError, match=CLIENT_FILE):
        connect(tmp_path)
