"""Requests and answers of the OpenAI-compatible routes, with OpenAI's names and defaults.

A field that would change the output and is not supported is refused by name; it is accepted only
with the value that means "not used".
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import override

from api.db.tables.artifacts import Deployment
from api.schemas.base import Schema

__all__ = [
    "ChatChoice",
    "ChatCompletion",
    "ChatCompletionRequest",
    "ChatMessage",
    "Completion",
    "CompletionChoice",
    "CompletionRequest",
    "GenerationRequest",
    "HostedModel",
    "Usage",
]

MAX_STOPS = 4
UNUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "presence_penalty": (None, 0, 0.0),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
"""Fields of OpenAI's that are not supported, and the values with which they change nothing."""


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
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def read_stops(value: object) -> object:
    """Make a list of one stop text."""
    return (value,) if isinstance(value, str) else value or ()


class ChatMessage(Schema):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str, BeforeValidator(read_text, json_schema_input_type=str | list[dict[str, str]])
    ]


class StreamOptions(Schema):
    """How a stream ends."""

    include_usage: bool = False


class GenerationRequest(Schema):
    """What chat and plain completions share."""

    model: str = Field(min_length=1, max_length=200)
    max_tokens: int | None = Field(default=None, ge=1, le=1_048_576)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=1, le=1_000_000)
    """Not OpenAI's, but every local server has it."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        tuple[str, ...],
        BeforeValidator(read_stops, json_schema_input_type=str | list[str] | None),
        Field(max_length=MAX_STOPS),
    ] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, record: object) -> object:
        """Drop fields whose values change nothing; what is left over is refused by name."""
        if not isinstance(record, Mapping):
            return record
        return {
            name: value
            for name, value in record.items()
            if name in cls.model_fields or not _is_unused(str(name), value)
        }

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None leaves it to the model's context."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


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

    messages: tuple[ChatMessage, ...] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_048_576)

    @property
    @override
    def token_limit(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """A text to continue."""

    prompt: str = Field(max_length=4_194_304)
    max_tokens: int | None = Field(default=16, ge=1, le=1_048_576)


class Usage(Schema):
    """Counted tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatChoice(Schema):
    """The one answer."""

    index: int = 0
    message: ChatMessage
    logprobs: None = None
    finish_reason: str


class ChatCompletion(Schema):
    """A conversation's next turn."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage


class CompletionChoice(Schema):
    """The one continuation."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: str


class Completion(Schema):
    """A text's continuation."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage


class HostedModel(Schema):
    """A model that can be asked for completions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "abq"
    artifact_id: str

    @classmethod
    def of(cls, deployment: Deployment) -> Self:
        """Show a deployment as a model."""
        return cls(
            id=deployment.name,
            created=int(deployment.created_at.timestamp()),
            artifact_id=deployment.artifact_id,
        )


def _is_unused(name: str, value: object) -> bool:
    # by type too: `logprobs: 0` of a plain completion asks for something, `false` does not
    return any(value == each and type(value) is type(each) for each in UNUSED.get(name, ()))
