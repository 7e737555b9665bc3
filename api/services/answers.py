"""OpenAI's shapes of one generation: the whole answer, and the chunks of a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from api.db.base import new_id
from api.schemas.answers import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    Usage,
)
from api.schemas.chat import ChatCompletionRequest
from api.schemas.completions import CompletionRequest
from api.schemas.sampling import GenerationRequest
from api.services.logprobs import Token, chat_logprobs, completion_logprobs, width_of
from api.services.tally import Tally

__all__ = ["AnswerShape", "Draft", "shape_of"]

Chunk = dict[str, Any]


@dataclass(slots=True)
class Draft:
    """One choice as it grows."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.texts)


class AnswerShape(Protocol):
    """Writes text and counts the way one route answers."""

    def whole(self, drafts: Sequence[Draft], usage: Usage) -> ChatCompletion | Completion:
        """The answer to a request that does not stream."""

    def opening(self, tally: Tally) -> Iterator[Chunk]:
        """Chunks ahead of the first text."""

    def piece(self, index: int, text: str, tokens: Sequence[Token], tally: Tally) -> Chunk:
        """The chunk of a piece of a choice's text."""

    def finish(self, index: int, reason: str, tally: Tally) -> Chunk:
        """The chunk that says why a choice ended."""

    def closing(self, tally: Tally) -> Iterator[Chunk]:
        """Chunks behind the last choice: the counts, where asked for."""


def shape_of(request: GenerationRequest, created: int) -> AnswerShape:
    """Choose the shape that a request is answered in; `created` is in seconds since 1970."""
    match request:
        case ChatCompletionRequest():
            return _ChatShape(id=new_id("chatcmpl"), created=created, request=request)
        case CompletionRequest():
            return _TextShape(
                id=new_id("cmpl"),
                created=created,
                request=request,
                has_logprobs=request.logprobs is not None,
            )
        case _:
            raise TypeError(type(request))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    kind: ClassVar[str]
    """What a chunk calls itself."""

    id: str
    created: int
    request: GenerationRequest

    def closing(self, tally: Tally) -> Iterator[Chunk]:
        if self.request.includes_usage:
            yield self._chunk([], tally, is_last=True)

    def _chunk(self, choices: list[Chunk], tally: Tally, *, is_last: bool = False) -> Chunk:
        chunk: Chunk = {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
        if is_last or self.request.counts_along:
            chunk["usage"] = tally.usage().model_dump()
        elif self.request.includes_usage:
            # every chunk has the member once the caller asked for it, all but the last as null
            chunk["usage"] = None
        return chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChatShape(_Shape):
    kind = "chat.completion.chunk"

    def whole(self, drafts: Sequence[Draft], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.request.model,
            choices=tuple(
                ChatChoice(
                    index=index,
                    message=AnswerMessage(content=draft.text),
                    logprobs=chat_logprobs(draft.tokens) if draft.tokens else None,
                    finish_reason=draft.finish_reason,
                )
                for index, draft in enumerate(drafts)
            ),
            usage=usage,
        )

    def opening(self, tally: Tally) -> Iterator[Chunk]:
        for index in range(self.request.n):
            yield self._delta(index, {"role": "assistant", "content": ""}, tally)

    def piece(self, index: int, text: str, tokens: Sequence[Token], tally: Tally) -> Chunk:
        return self._delta(index, {"content": text}, tally, tokens=tokens)

    def finish(self, index: int, reason: str, tally: Tally) -> Chunk:
        return self._delta(index, {}, tally, finish_reason=reason)

    def _delta(
        self,
        index: int,
        delta: dict[str, str],
        tally: Tally,
        *,
        tokens: Sequence[Token] = (),
        finish_reason: str | None = None,
    ) -> Chunk:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(tokens).model_dump() if tokens else None,
            "finish_reason": finish_reason,
        }
        return self._chunk([choice], tally)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextShape(_Shape):
    kind = "text_completion"

    has_logprobs: bool
    offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each choice's tokens that are out, where log-probabilities are."""

    def whole(self, drafts: Sequence[Draft], usage: Usage) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.request.model,
            choices=tuple(
                CompletionChoice(
                    index=index,
                    text=draft.text,
                    logprobs=completion_logprobs(draft.tokens, 0) if self.has_logprobs else None,
                    finish_reason=draft.finish_reason,
                )
                for index, draft in enumerate(drafts)
            ),
            usage=usage,
        )

    def opening(self, tally: Tally) -> Iterator[Chunk]:
        yield from ()

    def piece(self, index: int, text: str, tokens: Sequence[Token], tally: Tally) -> Chunk:
        logprobs = None
        if self.has_logprobs:
            offset = self.offsets.get(index, 0)
            logprobs = completion_logprobs(tokens, offset).model_dump()
            self.offsets[index] = offset + sum(width_of(each) for each in tokens)
        return self._piece(index, text, tally, logprobs=logprobs)

    def finish(self, index: int, reason: str, tally: Tally) -> Chunk:
        return self._piece(index, "", tally, finish_reason=reason)

    def _piece(
        self,
        index: int,
        text: str,
        tally: Tally,
        *,
        logprobs: Chunk | None = None,
        finish_reason: str | None = None,
    ) -> Chunk:
        choice = {
            "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason
        }  # fmt: skip
        return self._chunk([choice], tally)
