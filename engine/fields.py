"""Checks of the fields of a spec: every refusal names the field, the value and what would do."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from engine.errors import SpecError

__all__ = ["check_flag", "check_number", "check_range", "known_fields", "read_choice", "read_list"]


def known_fields(cls: type, record: object, prefix: str) -> dict[str, Any]:
    """Copy the fields of a JSON object that a dataclass has.

    Raises:
        SpecError: if it is no object, or naming the first field that the dataclass lacks.
    """
    if not isinstance(record, Mapping):
        raise SpecError(prefix.rstrip(".") or "spec", record, "write a JSON object")
    names = [each.name for each in fields(cls)]
    for name in record:
        if name not in names:
            raise SpecError(f"{prefix}{name}", record[name], f"use one of {', '.join(names)}")
    return dict(record)


def read_list(name: str, value: Any) -> tuple[Any, ...]:
    """Read a JSON list; a text is none, though Python walks through its letters.

    Raises:
        SpecError: naming the field and the value.
    """
    if not isinstance(value, list | tuple):
        raise SpecError(name, value, "write a list")
    return tuple(value)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false; a text such as "no" would count as true.

    Raises:
        SpecError: naming the field and the value.
    """
    if not isinstance(value, bool):
        raise SpecError(name, value, "use true or false")


def check_range(name: str, value: Any, low: int, high: int, also: int | None = None) -> None:
    """Refuse what is no whole number from `low` to `high`.

    Raises:
        SpecError: naming the field, the value and the range.
    """
    # bool is an int in Python, and True is no number of bits
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and (low <= value <= high or value == also):
        return
    other = f" or {also}" if also is not None else ""
    raise SpecError(name, value, f"use {low} to {high}{other}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number from `low` to `high`; NaN is none.

    Raises:
        SpecError: naming the field, the value and the range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        raise SpecError(name, value, f"use a number from {low} to {high}")


def read_choice(name: str, value: Any, choices: type) -> Any:
    """Read a member of a `StrEnum`.

    Raises:
        SpecError: naming the field, the value and the members.
    """
    members: list[Any] = list(choices)  # type: ignore[call-overload]  # an enum class is iterable
    if value not in members:
        raise SpecError(name, value, f"use one of {', '.join(members)}")
    return choices(value)
