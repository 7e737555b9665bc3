"""Options of the form `name=value`."""

import json
from typing import Any

from api.cli.errors import CliError

__all__ = ["read_pairs", "read_settings"]


def read_pairs(pairs: list[str] | None, option: str) -> dict[str, str]:
    """Read `name=value` texts.

    Raises:
        CliError: naming the text that has no name or no `=`.
    """
    values = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise CliError(f"{option} {pair}: write name=value")
        values[name] = value
    return values


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
    """Read `name=value` with JSON values; what is no JSON is text: `recipe=rtn`."""
    return {name: _value(text) for name, text in read_pairs(pairs, "--set").items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
