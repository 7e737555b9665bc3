"""A spec as a client writes it: the paper's notation, or JSON that says what it means.

Pydantic reads true as 1, and "yes" and 1 as true; here each is refused where the other is meant.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, get_args

from engine.errors import SpecError
from engine.recipe import Ingredients
from engine.spec import CalibrationSpec, LayerOverride, QuantSpec
from engine.target import BitTarget

__all__ = ["read_spec"]

PARTS = (QuantSpec, Ingredients, CalibrationSpec, LayerOverride, BitTarget)
TYPES = {each.name: each.type for part in PARTS for each in fields(part)}
FLAGS = frozenset(name for name, kind in TYPES.items() if kind in (bool, bool | None))
OPTIONAL = frozenset(name for name, kind in TYPES.items() if NoneType in get_args(kind))
GROUPS = frozenset({"ingredients", "calibration", "target"})


def read_spec(value: object) -> object:
    """Turn the paper's notation into a spec; pydantic reads the JSON form.

    Raises:
        SpecError: naming the field, the value and what would do.
    """
    if isinstance(value, str):
        return QuantSpec.from_notation(value)
    if isinstance(value, Mapping):
        _check_fields(value, "")
        return value
    raise SpecError("spec", value, "write w4a8 or the like, or a JSON object with w_bits")


def _check_fields(record: Mapping[Any, Any], prefix: str) -> None:
    for name, value in record.items():
        # pydantic names all unknown fields at once
        if name not in TYPES or (value is None and name in OPTIONAL):
            continue
        field = f"{prefix}{name}"
        if name in FLAGS and not isinstance(value, bool):
            raise SpecError(field, value, "write true or false")
        if name in GROUPS and not isinstance(value, Mapping):
            raise SpecError(field, value, "write a JSON object")
        if name not in FLAGS:
            _check_value(field, value)


def _check_value(field: str, value: object) -> None:
    if isinstance(value, bool):
        raise SpecError(field, value, "write a number or a text")
    if isinstance(value, Mapping):
        _check_fields(value, f"{field}.")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check_value(f"{field}.{index}", each)
