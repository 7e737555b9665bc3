"""Handing settings to another process: as the environment variables that they are read from."""

from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from api.settings import Settings

__all__ = ["settings_environment"]

PREFIX = "ABQ_"


def settings_environment(settings: Settings, inherited: Mapping[str, str]) -> dict[str, str]:
    """The inherited environment with exactly these settings in it."""
    # a variable of a single field would win over its group's
    others = {name: value for name, value in inherited.items() if not name.startswith(PREFIX)}
    return {**others, **_variables(settings)}


def _variables(settings: Settings) -> dict[str, str]:
    variables: dict[str, str] = {}
    for name in type(settings).model_fields:
        value = _reveal(getattr(settings, name))
        variables[PREFIX + name.upper()] = value if isinstance(value, str) else dumps(value)
    return variables


def _reveal(value: Any) -> Any:
    match value:
        case BaseModel():
            return {name: _reveal(getattr(value, name)) for name in type(value).model_fields}
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value)
        case dict():
            return {key: _reveal(each) for key, each in value.items()}
        case _:
            return value
