"""Between text and token ids of a hosted model, with vLLM's names."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from api.errors import InvalidRequest
from api.schemas.base import Schema
from api.schemas.chat import MAX_MESSAGES, ChatMessage
from api.schemas.completions import MAX_CHARACTERS
from api.schemas.sampling import MAX_TOKENS
from api.schemas.scalars import Integer, Switch

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized"]


class TokenizeRequest(Schema):
    """A text, or a conversation as the model's template renders it."""

    model: str = Field(min_length=1, max_length=200)
    prompt: str | None = Field(default=None, max_length=MAX_CHARACTERS)
    messages: tuple[ChatMessage, ...] | None = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES
    )
    add_special_tokens: Switch = True
    """Whether a prompt opens with the model's special tokens; a template writes its own."""
    return_token_strs: Switch = False

    @model_validator(mode="after")
    def _name_one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give prompt or messages, and not both", param="prompt")
        return self


class Tokenized(Schema):
    """The ids of a text."""

    count: int
    max_model_len: int
    """Tokens that prompt and completion may have together."""
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None = None


class DetokenizeRequest(Schema):
    """Token ids to read."""

    model: str = Field(min_length=1, max_length=200)
    tokens: tuple[Annotated[Integer, Field(ge=0)], ...] = Field(max_length=MAX_TOKENS)


class Detokenized(Schema):
    """The text of token ids."""

    prompt: str
