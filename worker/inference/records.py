"""Chunks of a model as the records that go to the API process.

`start` with the prompts' tokens and, where asked, the prompts themselves; `token` with text that
became certain; `finish` when one answer ends; `end` with the counts. Answer `i` to prompt `p` has
the index `p * n + i`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from engine.inference.request import FinishReason
from engine.inference.spelling import TokenText
from engine.inference.steps import TokenLogprobs
from engine.inference.text import TextCodec
from worker.inference.arrivals import Arrival
from worker.inference.token_widths import AnswerWidths, widths_in

__all__ = ["Batch", "Record", "RecordWriter", "error_record"]

Record = dict[str, Any]
Batch = list[Record]


def error_record(code: str, message: str, param: str | None = None) -> Record:
    """Say what went wrong."""
    return {"type": "error", "code": code, "message": message, "param": param}


class RecordWriter:
    """Writes one request's records and knows which answers are still open."""

    def __init__(
        self,
        text: TextCodec,
        prompts: Sequence[Sequence[int]],
        n: int,
        written: Sequence[str | None] = (),
    ) -> None:
        """Nothing is answered yet.

        Args:
            text: of the model.
            prompts: their ids.
            n: answers to each.
            written: the prompts as the caller wrote them, None for one that came as ids.
        """
        self._text = text
        self._prompts = prompts
        self._written = written or [None] * len(prompts)
        self._n = n
        self._open = set(range(len(prompts) * n))
        self._tokens = dict.fromkeys(self._open, 0)
        self._cached = dict.fromkeys(range(len(prompts)), 0)
        self._widths: dict[int, AnswerWidths] = {}
        self.is_cancelled = False
        """Whether an answer ended because somebody ended it."""

    @property
    def is_complete(self) -> bool:
        """Whether every answer has ended."""
        return not self._open

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(ids) for ids in self._prompts)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(self._tokens.values())

    def start(self, echoed: Sequence[Sequence[TokenLogprobs | None]] | None = None) -> Record:
        """The first record.

        Args:
            echoed: where prompts are given back: log-probabilities of their tokens, or nothing.
        """
        record: Record = {"type": "start", "prompt_tokens": self.prompt_tokens}
        if echoed is not None:
            record["echo"] = [
                self._echo(prompt, prompt * self._n + place, scores)
                for prompt, scores in enumerate(echoed)
                for place in range(self._n)
            ]
        return record

    def write(self, arrivals: Iterable[Arrival]) -> Batch:
        """The records of chunks that came together: one a piece of an answer, then the ends."""
        pieces: dict[int, Record] = {}
        ends: Batch = []
        for arrival in arrivals:
            chunk = arrival.item
            if isinstance(chunk, BaseException):
                raise chunk
            index = arrival.prompt * self._n + chunk.index
            self._tokens[index] = chunk.completion_tokens
            self._cached[arrival.prompt] = max(self._cached[arrival.prompt], chunk.cached_tokens)
            piece = pieces.setdefault(index, {"type": "token", "index": index, "text": ""})
            piece["text"] += chunk.text
            piece["tokens"] = chunk.completion_tokens
            if chunk.logprobs is not None:
                token = self._answered(index, chunk.logprobs)
                piece.setdefault("logprobs", []).append(token)
            if chunk.finish_reason is not None:
                ends.append(self._finish(index, chunk.finish_reason))
        return [each for each in pieces.values() if each["text"] or "logprobs" in each] + ends

    def finish_unanswered(self) -> Batch:
        """The ends of answers that were to have no tokens."""
        return [self._finish(index, FinishReason.LENGTH) for index in sorted(self._open)]

    def end(self) -> Record:
        """The last record."""
        return {
            "type": "end",
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": sum(self._cached.values()),
        }

    def _finish(self, index: int, reason: FinishReason) -> Record:
        self._open.discard(index)
        self.is_cancelled |= reason is FinishReason.CANCELLED
        # the last token may have no text, and so no record of its own
        return {
            "type": "finish",
            "index": index,
            "finish_reason": str(reason),
            "tokens": self._tokens[index],
        }

    def _echo(self, prompt: int, index: int, scores: Sequence[TokenLogprobs | None]) -> Record:
        """The caller's own text, or what the ids read that he sent."""
        ids, text = self._prompts[prompt], self._written[prompt]
        if text is None:
            text = self._text.decode(ids, with_specials=True)
        record: Record = {"index": index, "text": text}
        if scores:
            spelled = [self._text.spell(token_id) for token_id in ids]
            rows = zip(spelled, widths_in(text, spelled), scores, strict=True)
            record["logprobs"] = [self._told(*row) for row in rows]
        return record

    def _answered(self, index: int, score: TokenLogprobs) -> Record:
        token = self._text.spell(score.token_id)
        width = self._widths.setdefault(index, AnswerWidths()).add(token)
        return self._told(token, width, score)

    def _told(self, token: TokenText, width: int, score: TokenLogprobs | None) -> Record:
        """A token and how likely it was; nothing stands before one without a score."""
        top = () if score is None else score.top
        spelled = [(self._text.spell(token_id), logprob) for token_id, logprob in top]
        return {
            "token": token.text,
            "bytes": token.bytes,
            "characters": width,
            "logprob": None if score is None else score.logprob,
            "top": [[each.text, each.bytes, logprob] for each, logprob in spelled],
        }
