"""Texts and objects of any shape that are passed on as JSON: only what JSON in UTF-8 can say.

Python's reader takes more than that: half of a surrogate pair, NaN and infinities.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

__all__ = ["JsonObject", "JsonText", "JsonValueInvalid", "check_text"]

Place = tuple[str, ...]


class JsonValueInvalid(ValueError):
    """A text or a number cannot be passed on."""

    code: ClassVar[str] = "value_error"

    def __init__(self, place: Place, value: object, remedy: str) -> None:
        super().__init__(f"{'.'.join(place) or 'the value'} = {value!r} is not possible: {remedy}")
        self.place = place
        """Below the validated field; empty for the field itself."""
        self.value = value
        self.remedy = remedy


def check_value(value: Any) -> Any:
    """Refuse what cannot be passed on, however deep it lies.

    Raises:
        JsonValueInvalid: naming the first such place, its value and what would do.
    """
    for place, found in _walk(value):
        if isinstance(found, float) and not math.isfinite(found):
            raise JsonValueInvalid(place, found, "write a finite number or null")
        if isinstance(found, str):
            check_text(found, *place)
    return value


def check_text(text: str, *place: str) -> str:
    """Refuse a text with half of a surrogate pair.

    Args:
        text: as JSON gave it.
        place: of the text below the validated field.

    Raises:
        JsonValueInvalid: naming it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        remedy = "write whole characters, not half of a pair"
        raise JsonValueInvalid(place, text, remedy) from error
    return text


JsonText = Annotated[str, AfterValidator(check_value)]
JsonObject = Annotated[dict[str, Any], AfterValidator(check_value)]


def _walk(value: Any) -> Iterator[tuple[Place, Any]]:
    """Every value inside, names of members too; without recursion, for it may be deep."""
    left: list[tuple[Place, Any]] = [((), value)]
    while left:
        place, found = left.pop()
        yield place, found
        match found:
            case dict():
                yield from ((place, name) for name in found)
                left += [((*place, name), each) for name, each in found.items()]
            case list() | tuple():
                left += [((*place, str(at)), each) for at, each in enumerate(found)]
