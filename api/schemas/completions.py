"""Texts to continue as clients send them."""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from api.errors import InvalidRequest
from api.schemas.json_values import JsonValueInvalid, check_text
from api.schemas.sampling import MAX_TOKENS, MAX_TOP_LOGPROBS, GenerationRequest
from api.schemas.scalars import Integer, Switch

__all__ = ["CompletionRequest", "Prompt"]

MAX_PROMPTS = 256
MAX_CHARACTERS = 4_194_304
SHAPES = "write a text, a list of texts, a list of token ids or a list of such lists"

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""


def read_prompts(value: object) -> tuple[Prompt, ...]:
    """Make a list of prompts of any of OpenAI's four shapes."""
    if isinstance(value, str):
        return (_checked_text(value),)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(SHAPES)
    if _are_ids(value):
        return (_checked_ids(value),)
    if not all(isinstance(each, str) or (each and _are_ids(each)) for each in value):
        raise ValueError(SHAPES)
    if len({isinstance(each, str) for each in value}) > 1:
        raise ValueError("write texts or token ids, not both in one request")
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"use up to {MAX_PROMPTS} prompts in one request")
    return tuple(
        _checked_text(each, str(at)) if isinstance(each, str) else _checked_ids(each, str(at))
        for at, each in enumerate(value)
    )


def read_count(value: object) -> object:
    """Take false for nothing: to Python it is the number 0, which asks for something."""
    if value is True:
        raise ValueError("write how many of the likeliest tokens to tell, 0 to 20")
    return None if value is False else value


class CompletionRequest(GenerationRequest):
    """Texts to continue, each by itself."""

    prompt: Annotated[
        tuple[Prompt, ...],
        BeforeValidator(
            read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    max_tokens: Integer | None = Field(default=16, ge=0, le=MAX_TOKENS)
    """0 only together with `echo`: then the prompt is scored and nothing generated."""
    logprobs: Annotated[
        Integer | None,
        BeforeValidator(read_count, json_schema_input_type=int | None),
        Field(ge=0, le=MAX_TOP_LOGPROBS),
    ] = None
    """How many of the likeliest tokens are told beside each token."""
    echo: Switch = False
    """Whether the answer starts with the prompt, and its log-probabilities where asked for."""

    @model_validator(mode="after")
    def _check_token_limit(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens = 0 is not possible without echo: use at least 1", param="max_tokens"
            )
        return self


def _are_ids(value: object) -> bool:
    # a bool is an int to Python, and no token
    return isinstance(value, list | tuple) and all(
        isinstance(each, int) and not isinstance(each, bool) for each in value
    )


def _checked_ids(ids: Sequence[int], *place: str) -> tuple[int, ...]:
    if (least := min(ids)) < 0:
        raise JsonValueInvalid(place, least, "token ids are not negative; use 0 or more")
    return tuple(ids)


def _checked_text(text: str, *place: str) -> str:
    if len(text) > MAX_CHARACTERS:
        shown = f"{len(text)} characters"
        raise JsonValueInvalid(place, shown, f"use up to {MAX_CHARACTERS} in one prompt")
    return check_text(text, *place)
