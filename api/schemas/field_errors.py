"""What is wrong with the fields of a request: each in a sentence with value and remedy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from api.schemas.base import FieldError
from api.schemas.json_values import JsonValueInvalid
from engine.errors import SpecError

__all__ = ["UNKNOWN_FIELD", "field_errors", "one_message"]

# the parts of a request that pydantic names first in an error's location
REQUEST_PARTS = ("body", "query", "path", "header")
UNKNOWN_FIELD = ("extra_forbidden", "unexpected_keyword_argument")
MISSING_FIELD = ("missing", "missing_argument", "missing_keyword_only_argument")
NO_OBJECT = ("model_attributes_type", "model_type", "dict_type")
MAX_SHOWN = 100
"""Characters of a value that a message repeats."""
MAX_TOLD = 5
"""Fields whose faults are told in full."""


def field_errors(found: Sequence[Mapping[str, Any]]) -> tuple[FieldError, ...]:
    """Put what pydantic found into words.

    Args:
        found: at least one, as `ValidationError.errors` gives them.
    """
    return tuple(_encodable(_field_error(each)) for each in _innermost(found))


def one_message(items: Sequence[FieldError]) -> str:
    """Say all of it: every field by name, the first ones with value and remedy."""
    if len(items) == 1:
        return items[0].message
    told = [_naming_its_field(each) for each in items[:MAX_TOLD]]
    if rest := [str(each.param) for each in items[MAX_TOLD:]]:
        told.append(f"also {', '.join(rest)}")
    return f"{len(items)} fields are not valid: {'; '.join(told)}."


def _naming_its_field(item: FieldError) -> str:
    said = item.message.rstrip(".")
    return said if item.param is None or item.param in said else f"{item.param}: {said}"


def _innermost(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    # a list whose only item is wrong is also reported as too short; the item is what matters
    places = [tuple(each["loc"]) for each in found]
    return [
        each
        for each, place in zip(found, places, strict=True)
        if not any(other != place and other[: len(place)] == place for other in places)
    ]


def _field_error(found: Mapping[str, Any]) -> FieldError:
    location = tuple(found["loc"])
    location = location[1:] if location and location[0] in REQUEST_PARTS else location
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return _spec_item(location, cause)
    if isinstance(cause, JsonValueInvalid):
        return _json_item(location, cause)
    if message := _body_fault(found):
        return FieldError(param=None, code=found["type"], message=message)
    param = ".".join(str(part) for part in location if part != "[key]") or None
    message = _sentence(param, found)
    value = _shown(found.get("input")) if found["type"] not in MISSING_FIELD else None
    return FieldError(param=param, code=found["type"], message=message, value=value)


def _body_fault(found: Mapping[str, Any]) -> str | None:
    """What is wrong with a body that was not looked into."""
    if found["type"] == "json_invalid":
        reason = str(found.get("ctx", {}).get("error", "it cannot be read")).rstrip(".")
        at = f"{reason[:1].lower()}{reason[1:]} at character {found['loc'][-1]}"
        return f"The body is no valid JSON: {at}."
    if found["type"] in NO_OBJECT and isinstance(found.get("input"), bytes):
        return "The body did not come as JSON: send it with Content-Type: application/json."
    return None


def _spec_item(location: tuple[Any, ...], error: SpecError) -> FieldError:
    """Join where pydantic was with the field that the vocabulary names, each part once."""
    parts = [part for part in error.field.split(".") if part not in location]
    return FieldError(
        param=".".join(str(part) for part in (*location, *parts)),
        code=error.code,
        message=error.message,
        value=_shown(error.value),
        remedy=error.remedy,
    )


def _json_item(location: tuple[Any, ...], error: JsonValueInvalid) -> FieldError:
    param = ".".join(str(part) for part in (*location, *error.place))
    value = _shown(error.value)
    return FieldError(
        param=param,
        code=error.code,
        message=f"{param} = {value!r} is not possible: {error.remedy}.",
        value=value,
        remedy=error.remedy,
    )


def _sentence(param: str | None, found: Mapping[str, Any]) -> str:
    subject = param or "the body"
    if found["type"] in MISSING_FIELD:
        return f"{subject} is required."
    value = _shown(found.get("input"))
    given = f"{subject} = {value!r}" if value is not None else subject
    if found["type"] in UNKNOWN_FIELD:
        return f"{given} is no supported field; remove it or correct its name."
    text = str(found["msg"]).removeprefix("Value error, ")
    # to whom writes JSON a tuple is a list
    text = text.replace("valid tuple", "valid list").replace("Tuple should", "List should")
    if found["type"] in NO_OBJECT:
        text = "write a JSON object"
    return f"{given} is not valid: {text[:1].lower()}{text[1:]}."


def _shown(value: object) -> str | int | float | None:
    """What of a refused value an answer repeats."""
    if isinstance(value, str):
        return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."
    return value if isinstance(value, int | float) else None


def _encodable(item: FieldError) -> FieldError:
    """Spell out what a refused text or number has that no answer can hold."""
    value = item.value
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    return item.model_copy(
        update={
            "param": None if item.param is None else _escaped(item.param),
            "message": _escaped(item.message),
            "value": _escaped(value) if isinstance(value, str) else value,
        }
    )


def _escaped(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
