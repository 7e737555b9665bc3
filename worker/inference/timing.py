"""When the tokens of one request came, told to the metrics."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from engine.inference.request import GenerationChunk
from worker.inference.arrivals import Arrival
from worker.inference.metrics import InferenceMetrics
from worker.inference.pool import ModelInUse

__all__ = ["RequestTiming"]


@dataclass(slots=True, kw_only=True)
class _Answer:
    first: float
    last: float
    tokens: int
    queue_s: float


class RequestTiming:
    """Follows the answers of one request. All moments are of `time.perf_counter()`."""

    def __init__(self, metrics: InferenceMetrics, model: ModelInUse, admitted: float) -> None:
        self._metrics = metrics
        self._model = model
        self._admitted = admitted
        self._begun: dict[int, float] = {}
        self._answers: dict[tuple[int, int], _Answer] = {}

    def begin(self, prompt: int, tokens: int) -> None:
        """Note that the engine has a prompt now."""
        self._begun[prompt] = time.perf_counter()
        self._metrics.count_prompt(self._model.labels, tokens)

    def follow(self, arrivals: Iterable[Arrival]) -> None:
        """Measure chunks."""
        for arrival in arrivals:
            if isinstance(arrival.item, GenerationChunk):
                self._follow(arrival.prompt, arrival.item, arrival.moment)

    def _follow(self, prompt: int, chunk: GenerationChunk, moment: float) -> None:
        labels, key = self._model.labels, (prompt, chunk.index)
        answer = self._answers.get(key)
        before = answer.tokens if answer else 0
        if new := chunk.completion_tokens - before:
            self._model.activity.add_tokens(new)
            self._metrics.count_generated(labels, new)
        if answer is None:
            queue_s = self._begun.get(prompt, moment) - self._admitted + chunk.queue_s
            answer = _Answer(first=moment, last=moment, tokens=0, queue_s=queue_s)
            self._answers[key] = answer
            self._metrics.observe("time_to_first_token_seconds", labels, moment - self._admitted)
        elif new:
            self._metrics.observe("inter_token_latency_seconds", labels, moment - answer.last)
        answer.last, answer.tokens = moment, chunk.completion_tokens
        if chunk.finish_reason is not None:
            self._metrics.count_end(labels, str(chunk.finish_reason))
            self._observe_whole(answer)

    def _observe_whole(self, answer: _Answer) -> None:
        labels, to_first = self._model.labels, answer.first - self._admitted
        decode_s = answer.last - answer.first
        spans = {
            "e2e_request_latency_seconds": answer.last - self._admitted,
            "request_queue_time_seconds": answer.queue_s,
            "request_prefill_time_seconds": max(0.0, to_first - answer.queue_s),
            "request_decode_time_seconds": decode_s,
        }
        if answer.tokens > 1:
            spans["request_time_per_output_token_seconds"] = decode_s / (answer.tokens - 1)
        for name, seconds in spans.items():
            self._metrics.observe(name, labels, seconds)
