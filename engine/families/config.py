"""Which fields of a stranger's config a family keeps, and within which limits; torch-free."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import UnsupportedModel

__all__ = [
    "ACTIVATIONS",
    "COMMON_FIELDS",
    "ROPE_FIELDS",
    "ROPE_LISTS",
    "FieldRule",
    "flag",
    "layer_kinds",
    "number",
    "one_of",
    "rope",
    "unsupported",
    "whole",
]

Check = Callable[[str, Any], None]
"""Takes name and value of a field, and raises `UnsupportedModel` where the value will not do."""

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LAYER_KINDS = ("full_attention", "sliding_attention")
# "dynamic" changes with the length of the request: a block cannot be calibrated alone; so does
# "longrope", but for requests within the original positions
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MAX_ROPE_NUMBER = 1e12
ROPE_LISTS = ("short_factor", "long_factor")
MAX_ROPE_FACTORS = 512
"""One for each two channels of the largest head."""
MAX_TOKEN_ID = 1_000_000
MAX_STOP_TOKENS = 64


def as_it_is(value: Any) -> Any:
    """Keep a value."""
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRule:
    """One field of a config that the model class may see."""

    check: Check
    nullable: bool = False
    """Whether null means something else than silence, as `sliding_window` does."""
    convert: Callable[[Any], Any] = as_it_is
    """Makes a value that passed what the model class takes."""


def whole(low: int, high: int, *, nullable: bool = False) -> FieldRule:
    """Keep a whole number from `low` to `high`."""

    def check(name: str, value: Any) -> None:
        # bool is an int in Python, and True is no size
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise unsupported(name, value, f"a whole number from {low} to {high}")

    return FieldRule(check=check, nullable=nullable)


def number(low: float, high: float, *, nullable: bool = False) -> FieldRule:
    """Keep a number from `low` to `high`; NaN is none.

    A writer of JSON may say 30 for 30.0, and the model class takes a float alone.
    """

    def check(name: str, value: Any) -> None:
        if not _is_number(value) or not low <= value <= high:
            raise unsupported(name, value, f"a number from {low:g} to {high:g}")

    return FieldRule(check=check, nullable=nullable, convert=float)


def flag(*, only: bool | None = None) -> FieldRule:
    """Keep true or false, or one of the two alone."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, bool) or only not in (None, value):
            remedy = "true or false" if only is None else str(only).lower()
            raise unsupported(name, value, remedy)

    return FieldRule(check=check)


def one_of(*choices: Any) -> FieldRule:
    """Keep one of the values."""

    def check(name: str, value: Any) -> None:
        # a list is no member of a tuple, but it may be asked
        if value not in choices:
            raise unsupported(name, value, f"one of {', '.join(map(str, choices))}")

    return FieldRule(check=check)


def layer_kinds() -> FieldRule:
    """Keep a list that says of every layer whether its attention slides."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list) or any(each not in LAYER_KINDS for each in value):
            raise unsupported(name, value, f"a list of {' and '.join(LAYER_KINDS)}")

    return FieldRule(check=check)


def rope(*kinds: str) -> FieldRule:
    """Keep an object of rotary parameters, or one for each kind of layer."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise unsupported(name, value, "an object")
        for layers in set(value) & set(LAYER_KINDS):
            if value[layers] is not None:
                check(f"{name}.{layers}", value[layers])
        _check_rope(name, {key: value[key] for key in value if key not in LAYER_KINDS}, kinds)

    return FieldRule(check=check)


def unsupported(field: str, value: object, remedy: str) -> UnsupportedModel:
    """Make the refusal that names the field, its value and what would do."""
    return UnsupportedModel(field, f"{field} = {value!r} is not supported: use {remedy}")


def _check_rope(name: str, value: Mapping[str, Any], kinds: tuple[str, ...]) -> None:
    kind = value.get("rope_type", value.get("type", "default"))
    if kind not in kinds:
        raise unsupported(f"{name}.rope_type", kind, f"one of {', '.join(kinds)}")
    for key, each in value.items():
        if key in ("rope_type", "type") or each is None or isinstance(each, bool):
            continue
        if key in ROPE_LISTS:
            _check_factors(f"{name}.{key}", each)
        else:
            number(0, MAX_ROPE_NUMBER).check(f"{name}.{key}", each)


def _check_factors(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) > MAX_ROPE_FACTORS:
        raise unsupported(name, value, f"a list of at most {MAX_ROPE_FACTORS} numbers")
    for each in value:
        number(1e-3, 1e6).check(name, each)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_stop_tokens(name: str, value: Any) -> None:
    listed = value if isinstance(value, list) else [value]
    # llama 1 has -1 for none
    token = whole(-1, MAX_TOKEN_ID)
    if not 1 <= len(listed) <= MAX_STOP_TOKENS:
        raise unsupported(name, value, f"1 to {MAX_STOP_TOKENS} token ids")
    for each in listed:
        token.check(name, each)


DTYPES = one_of("float32", "float16", "bfloat16")
COMMON_FIELDS: Mapping[str, FieldRule] = {
    "tie_word_embeddings": flag(),
    "bos_token_id": whole(-1, MAX_TOKEN_ID),
    "eos_token_id": FieldRule(check=_check_stop_tokens),
    "initializer_range": number(0, 100),
    "torch_dtype": DTYPES,
    "dtype": DTYPES,
}
"""What every family keeps."""
ROPE_FIELDS: Mapping[str, FieldRule] = {
    "rope_theta": number(1, MAX_ROPE_NUMBER),
    "rope_scaling": rope(*ROPE_TYPES),
    "rope_parameters": rope(*ROPE_TYPES),
}
"""What a family with rotary positions keeps."""
