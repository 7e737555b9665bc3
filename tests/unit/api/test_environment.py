from pathlib import Path

from pydantic import SecretStr

from api.cli.environment import settings_environment
from api.settings import HubSettings, InferenceSettings, ServerSettings, Settings


def test_a_process_started_with_the_environment_reads_equal_settings(monkeypatch):
    settings = Settings(
        data_dir=Path("/srv/abq"),
        server=ServerSettings(port=8123),
        hub=HubSettings(token=SecretStr("hf_x"), model_roots={"here": Path("/models")}),
        inference=InferenceSettings(token=SecretStr("s")),
    )

    for name, value in settings_environment(settings, {}).items():
        monkeypatch.setenv(name, value)

    assert Settings() == settings


def test_a_variable_of_the_shell_does_not_win_over_an_option():
    inherited = {"ABQ_SERVER__PORT": "1", "PATH": "/bin"}

    environment = settings_environment(Settings(server=ServerSettings(port=2)), inherited)

    assert "ABQ_SERVER__PORT" not in environment
    assert environment["PATH"] == "/bin"
