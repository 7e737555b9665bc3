"""What the two kinds of generation share, with OpenAI's names and defaults and those of vLLM.

A field that would change the output and is not supported is refused by name; it is accepted only
with the value that means "not used".
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from api.errors import InvalidRequest
from api.schemas.base import Schema
from api.schemas.json_values import JsonObject
from api.schemas.scalars import Integer, Number, Switch

__all__ = [
    "MAX_TOKENS",
    "MAX_TOP_LOGPROBS",
    "GenerationRequest",
    "JsonSchemaFormat",
    "ResponseFormat",
    "StreamOptions",
]

MAX_TOKENS = 1_048_576
MAX_STOPS = 16
"""OpenAI takes 4; evaluation harnesses send more."""
MAX_STOP_IDS = 32
MAX_BIASES = 1024
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_GUIDE = 65_536
"""Characters of a schema or a regular expression."""
UNUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logprobs": (None, False),
    "max_completion_tokens": (None,),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None,),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of OpenAI's that are not supported, and the values with which they change nothing."""


def read_stops(value: object) -> object:
    """Make a list of one stop text."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, list | tuple):
        raise ValueError("write a text or a list of texts")  # noqa: TRY004 - for pydantic
    return value


class StreamOptions(Schema):
    """What a stream tells beside the text."""

    include_usage: Switch = False
    """Token counts in a last chunk without choices."""
    continuous_usage_stats: Switch = False
    """Token counts so far in every chunk. vLLM's."""


class JsonSchemaFormat(Schema):
    """A schema that the answer is a document of."""

    name: str = Field(default="answer", max_length=64)
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: Switch | None = None
    """The schema is always kept to."""


class ResponseFormat(Schema):
    """What the answer is written in."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GenerationRequest(Schema):
    """What chat and plain completions share."""

    model: str = Field(min_length=1, max_length=200)
    max_tokens: Integer | None = Field(default=None, ge=1, le=MAX_TOKENS)
    min_tokens: Integer = Field(default=0, ge=0, le=MAX_TOKENS)
    """No end of turn before so many tokens."""
    n: Integer = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: Number = Field(default=1.0, ge=0.0, le=2.0)
    top_p: Number = Field(default=1.0, gt=0.0, le=1.0)
    top_k: Integer | None = Field(default=None, ge=-1, le=1_000_000)
    """0 and -1 keep the whole vocabulary. Not OpenAI's, but every local server has it."""
    min_p: Number = Field(default=0.0, ge=0.0, le=1.0)
    """Tokens less likely than this share of the likeliest one are left out."""
    repetition_penalty: Number = Field(default=1.0, ge=0.01, le=10.0)
    presence_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[Number, Field(ge=-100.0, le=100.0)]] = (
        Field(default_factory=dict, max_length=MAX_BIASES)
    )
    """What is added to the logits of token ids."""
    seed: Integer | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        BeforeValidator(read_stops, json_schema_input_type=str | list[str] | None),
        Field(max_length=MAX_STOPS),
    ] = ()
    stop_token_ids: tuple[Annotated[Integer, Field(ge=0)], ...] = Field(
        default=(), max_length=MAX_STOP_IDS
    )
    ignore_eos: Switch = False
    """Go on behind the end of a turn; for measurements."""
    response_format: ResponseFormat | None = None
    guided_regex: str | None = Field(default=None, min_length=1, max_length=MAX_GUIDE)
    """A regular expression that the whole answer matches."""
    stream: Switch = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, record: object) -> object:
        """Drop fields whose values change nothing; what is left over is refused by name.

        A null is OpenAI's way to leave a field at its default.
        """
        if not isinstance(record, Mapping):
            return record
        return {
            name: value
            for name, value in record.items()
            if not (value is None and name in cls.model_fields and _has_default(cls, str(name)))
            and (name in cls.model_fields or not _is_unused(str(name), value))
        }

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options are for a stream; add stream = true", param="stream_options"
            )
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise InvalidRequest(
                f"min_tokens = {self.min_tokens} is more than the {limit} that may be generated",
                param="min_tokens",
            )
        if self.response_format is not None:
            _check_format(self.response_format, is_guided=self.guided_regex is not None)
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None leaves it to the model's context."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_along(self) -> bool:
        """Whether every chunk of a stream carries the token counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def _check_format(wanted: ResponseFormat, *, is_guided: bool) -> None:
    if wanted.type != "text" and is_guided:
        raise InvalidRequest(
            "guided_regex and response_format exclude each other; send one", param="guided_regex"
        )
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise InvalidRequest(
            "json_schema belongs to the type json_schema, and must be there",
            param="response_format.json_schema",
        )


def _has_default(kind: type[GenerationRequest], name: str) -> bool:
    return not kind.model_fields[name].is_required()


def _is_unused(name: str, value: object) -> bool:
    # by type too: `logprobs: 0` of a plain completion asks for something, `false` does not
    return any(value == each and type(value) is type(each) for each in UNUSED.get(name, ()))
