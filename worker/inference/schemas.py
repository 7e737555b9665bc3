"""What the API process sends to the inference process; ranges are the engine's, checked there."""

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.inference.sampling_params import Guide, GuideKind

__all__ = ["DetokenizeBody", "GenerateBody", "GuideBody", "MessageBody", "TokenizeBody"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MessageBody(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The members that the turn has; most templates want a content in any case.

        Arguments of calls, which clients send as JSON texts, are objects here: templates write
        them with `tojson`.
        """
        turn = {"content": "", **self.model_dump(exclude_none=True)}
        if self.tool_calls:
            turn["tool_calls"] = [_with_arguments_read(call) for call in self.tool_calls]
        return turn


class GuideBody(_Body):
    """A language that the answer stays in."""

    kind: GuideKind
    text: str = ""


class GenerateBody(_Body):
    """One request: `n` answers to each prompt, or to one conversation."""

    artifact_id: str = Field(max_length=64)
    tenant: str = ""
    """On whose behalf; tenants take turns where requests wait."""
    cache_salt: str | None = None
    prompts: tuple[str | tuple[int, ...], ...] | None = Field(default=None, min_length=1)
    messages: tuple[MessageBody, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    echo: bool = False
    """Answers start with their prompts; `max_tokens` may be 0 then."""
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    response_format: GuideBody | None = None
    guided_regex: str | None = None

    @model_validator(mode="after")
    def _check_one_input(self) -> Self:
        if (self.prompts is None) == (self.messages is None):
            raise ValueError("give prompts or messages, and not both")
        return self

    @property
    def count(self) -> int:
        """Prompts."""
        return 1 if self.prompts is None else len(self.prompts)

    @property
    def answers(self) -> int:
        """What is generated or, of a prompt that is only scored, waits for its turn."""
        return self.count if self.max_tokens == 0 else self.count * max(self.n, 1)

    @property
    def written(self) -> tuple[str | None, ...]:
        """The prompts as texts, None for one that came as ids."""
        return tuple(each if isinstance(each, str) else None for each in self.prompts or ())

    @property
    def guide(self) -> Guide | None:
        """The language of the answer, whichever field names it."""
        if self.guided_regex is not None:
            return Guide(kind=GuideKind.REGEX, text=self.guided_regex)
        wanted = self.response_format
        return None if wanted is None else Guide(kind=wanted.kind, text=wanted.text)


class TokenizeBody(_Body):
    """A text or a conversation to turn into ids."""

    artifact_id: str = Field(max_length=64)
    prompt: str | None = None
    messages: tuple[MessageBody, ...] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(_Body):
    """Ids to turn into a text."""

    artifact_id: str = Field(max_length=64)
    tokens: tuple[int, ...]


def _with_arguments_read(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        # a model's own words, cut short perhaps: the template shows them as they are
        return call
    return {**call, "function": {**function, "arguments": arguments}}
