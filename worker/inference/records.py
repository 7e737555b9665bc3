"""Chunks of a model as the records that go to the API process.

`start` with the prompts' tokens and, where asked, the prompts themselves; `token` with text that
became certain; `finish` when one answer ends; `end` with the counts. Answer `i` to prompt `p` has
the index `p * n + i`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from engine.inference.request import FinishReason
from engine.inference.steps import TokenLogprobs
from engine.inference.text import TextCodec
from worker.inference.arrivals import Arrival

__all__ = ["Batch", "Record", "RecordWriter", "error_record"]

Record = dict[str, Any]
Batch = list[Record]


def error_record(code: str, message: str, param: str | None = None) -> Record:
    """Say what went wrong."""
    return {"type": "error", "code": code, "message": message, "param": param}


class RecordWriter:
    """Writes one request's records and knows which answers are still open."""

    def __init__(self, text: TextCodec, prompts: Sequence[Sequence[int]], n: int) -> None:
        self._text = text
        self._prompts = prompts
        self._n = n
        self._open = set(range(len(prompts) * n))
        self._tokens = dict.fromkeys(self._open, 0)
        self._cached = dict.fromkeys(range(len(prompts)), 0)
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
                self._echo(prompt * self._n + place, self._prompts[prompt], scores)
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
                piece.setdefault("logprobs", []).append(self._spelled(chunk.logprobs))
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
        return {"type": "finish", "index": index, "finish_reason": str(reason)}

    def _echo(
        self, index: int, ids: Sequence[int], scores: Sequence[TokenLogprobs | None]
    ) -> Record:
        record: Record = {"index": index, "text": self._text.decode(ids, with_specials=True)}
        if scores:
            record["logprobs"] = [
                self._unscored(token_id) if score is None else self._spelled(score)
                for token_id, score in zip(ids, scores, strict=True)
            ]
        return record

    def _unscored(self, token_id: int) -> Record:
        """A token with nothing before it."""
        spelled = self._text.spell(token_id)
        return {"token": spelled.text, "bytes": spelled.bytes, "logprob": None, "top": []}

    def _spelled(self, score: TokenLogprobs) -> Record:
        top = [(self._text.spell(token_id), logprob) for token_id, logprob in score.top]
        return self._unscored(score.token_id) | {
            "logprob": score.logprob,
            "top": [[each.text, each.bytes, logprob] for each, logprob in top],
        }
