"""Texts to continue as clients send them."""

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from api.errors import InvalidRequest
from api.schemas.sampling import MAX_TOKENS, MAX_TOP_LOGPROBS, GenerationRequest

__all__ = ["CompletionRequest", "Prompt"]

MAX_PROMPTS = 256
MAX_CHARACTERS = 4_194_304
SHAPES = "write a text, a list of texts, a list of token ids or a list of such lists"

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""


def read_prompts(value: object) -> tuple[Prompt, ...]:
    """Make a list of prompts of any of OpenAI's four shapes."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(SHAPES)
    if _are_ids(value):
        return (tuple(value),)
    if not all(isinstance(each, str) or (each and _are_ids(each)) for each in value):
        raise ValueError(SHAPES)
    if len({isinstance(each, str) for each in value}) > 1:
        raise ValueError("write texts or token ids, not both in one request")
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"use up to {MAX_PROMPTS} prompts in one request")
    return tuple(each if isinstance(each, str) else tuple(each) for each in value)


def read_count(value: object) -> object:
    """Take false for nothing: to Python it is the number 0, which asks for something."""
    if value is True:
        raise ValueError("write how many of the likeliest tokens to tell, 0 to 20")
    return None if value is False else value


class CompletionRequest(GenerationRequest):
    """Texts to continue, each by itself."""

    prompt: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_CHARACTERS)] | tuple[int, ...], ...],
        BeforeValidator(
            read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    max_tokens: int | None = Field(default=16, ge=0, le=MAX_TOKENS)
    """0 only together with `echo`: then the prompt is scored and nothing generated."""
    logprobs: Annotated[
        int | None,
        BeforeValidator(read_count, json_schema_input_type=int | None),
        Field(ge=0, le=MAX_TOP_LOGPROBS),
    ] = None
    """How many of the likeliest tokens are told beside each token."""
    echo: bool = False
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
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value
    )
