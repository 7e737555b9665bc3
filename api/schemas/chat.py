"""Conversations as clients send them."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import override

from api.errors import InvalidRequest
from api.schemas.base import Schema
from api.schemas.json_values import JsonObject, JsonText
from api.schemas.sampling import MAX_TOKENS, MAX_TOP_LOGPROBS, GenerationRequest
from api.schemas.scalars import Integer, Switch

__all__ = ["ChatCompletionRequest", "ChatMessage", "Tool"]

MAX_MESSAGES = 2048
MAX_TOOLS = 128


def read_text(value: object) -> object:
    """Join the text parts of a message into one text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("write a text or a list of text parts")  # noqa: TRY004 - for pydantic
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise ValueError("only parts of the type text are supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of the type text has a text")  # noqa: TRY004 - for pydantic
        texts.append(part["text"])
    return "".join(texts)


class ChatMessage(Schema):
    """A turn of a conversation; clients send an answer's turn back with all members that it has."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: JsonText | None = None
    tool_calls: tuple[JsonObject, ...] | None = None
    """What the assistant called, for the model's template."""
    tool_call_id: JsonText | None = None
    content: Annotated[
        JsonText | None,
        BeforeValidator(read_text, json_schema_input_type=str | list[dict[str, str]] | None),
    ] = Field(default=None, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, record: object) -> object:
        """Drop members that say nothing; what is left over is refused by name."""
        if not isinstance(record, Mapping):
            return record
        return {
            name: value
            for name, value in record.items()
            if name in cls.model_fields
            or not (value is None or (name == "annotations" and value == []))
        }

    @field_validator("content")
    @classmethod
    def _require_text(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not info.data.get("tool_calls"):
            raise ValueError("write a text or a list of text parts")
        return value


class Tool(Schema):
    """A function that the model may call."""

    type: Literal["function"]
    function: JsonObject
    """`name`, `description`, `parameters`: what the model's template shows of it."""


class ChatCompletionRequest(GenerationRequest):
    """A conversation to continue."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "SmolLM2-135M-Instruct-w4a8",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "stream": True,
                }
            ]
        }
    )

    messages: tuple[ChatMessage, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Integer | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: Switch = False
    top_logprobs: Integer = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: tuple[Tool, ...] = Field(default=(), max_length=MAX_TOOLS)
    """Shown to the model where its template has a place for them; else refused."""
    tool_choice: Literal["none", "auto"] = "auto"

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs = {self.top_logprobs} needs logprobs = true", param="top_logprobs"
            )
        return self

    @property
    @override
    def token_limit(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def shown_tools(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return () if self.tool_choice == "none" else self.tools
