"""OpenAI's shapes of one generation: the whole answer, and the chunks of a stream."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from api.db.base import new_id
from api.schemas.completions import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatMessage,
    Completion,
    CompletionChoice,
    GenerationRequest,
    Usage,
)

__all__ = ["AnswerShape", "shape_of"]

Chunk = dict[str, Any]


class AnswerShape(Protocol):
    """Writes text and counts the way one route answers."""

    def whole(self, text: str, end: Mapping[str, Any]) -> ChatCompletion | Completion:
        """The answer to a request that does not stream; `end` is the last record."""

    def opening(self) -> Iterator[Chunk]:
        """Chunks ahead of the first text."""

    def text(self, text: str) -> Chunk:
        """The chunk of a piece of text."""

    def closing(self, end: Mapping[str, Any]) -> Iterator[Chunk]:
        """Chunks behind the last text: why it ended and, where asked, the counts."""


def shape_of(request: GenerationRequest, created: int) -> AnswerShape:
    """Choose the shape that a request is answered in; `created` is in seconds since 1970."""
    if isinstance(request, ChatCompletionRequest):
        return _ChatShape(id=new_id("chatcmpl"), created=created, request=request)
    return _TextShape(id=new_id("cmpl"), created=created, request=request)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    id: str
    created: int
    request: GenerationRequest

    def _chunk(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None) -> Chunk:
        chunk: Chunk = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
        if self.request.includes_usage:
            # every chunk has the member once the caller asked for it, all but the last as null
            chunk["usage"] = usage.model_dump() if usage else None
        return chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChatShape(_Shape):
    def whole(self, text: str, end: Mapping[str, Any]) -> ChatCompletion:
        message = ChatMessage(role="assistant", content=text)
        choice = ChatChoice(message=message, finish_reason=end["finish_reason"])
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.request.model,
            choices=(choice,),
            usage=_usage(end),
        )

    def opening(self) -> Iterator[Chunk]:
        yield self._delta({"role": "assistant", "content": ""})

    def text(self, text: str) -> Chunk:
        return self._delta({"content": text})

    def closing(self, end: Mapping[str, Any]) -> Iterator[Chunk]:
        yield self._delta({}, end["finish_reason"])
        if self.request.includes_usage:
            yield self._chunk("chat.completion.chunk", [], _usage(end))

    def _delta(self, delta: dict[str, str], finish_reason: str | None = None) -> Chunk:
        choice = {
            "index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason
        }  # fmt: skip
        return self._chunk("chat.completion.chunk", [choice], None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextShape(_Shape):
    def whole(self, text: str, end: Mapping[str, Any]) -> Completion:
        choice = CompletionChoice(text=text, finish_reason=end["finish_reason"])
        return Completion(
            id=self.id,
            created=self.created,
            model=self.request.model,
            choices=(choice,),
            usage=_usage(end),
        )

    def opening(self) -> Iterator[Chunk]:
        yield from ()

    def text(self, text: str) -> Chunk:
        return self._piece(text)

    def closing(self, end: Mapping[str, Any]) -> Iterator[Chunk]:
        yield self._piece("", end["finish_reason"])
        if self.request.includes_usage:
            yield self._chunk("text_completion", [], _usage(end))

    def _piece(self, text: str, finish_reason: str | None = None) -> Chunk:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk("text_completion", [choice], None)


def _usage(end: Mapping[str, Any]) -> Usage:
    prompt, completion = end["prompt_tokens"], end["completion_tokens"]
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
