"""Callers of an engine and what they see: time to the first token, time between tokens, tokens.

Callers live in one thread and are told of every token in the engine's own, as the endpoint is; what
HTTP costs is not in here.
"""

import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.serve_case import ServeCase
from benchmarks.serve_engine import ServedModel
from engine.errors import EngineError
from engine.inference.request import GenerationChunk, GenerationRequest
from engine.inference.ticket import Ticket

__all__ = ["measure_load"]

PATIENCE_S = 120.0
"""Without any token an engine hangs."""
WARM_UPS = 1
"""Requests of a caller before those that count."""


@dataclass(slots=True)
class _Timeline:
    """One request."""

    submitted_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        return (self.token_s[0] - self.submitted_s) * 1e3

    @property
    def between_ms(self) -> list[float]:
        stamps = np.array(self.token_s)
        gaps: list[float] = (np.diff(stamps) * 1e3).tolist()
        return gaps


def measure_load(case: ServeCase, model: ServedModel) -> dict[str, Any]:
    """Send the requests of a case; returns a row.

    Raises:
        EngineError: if a request fails.
        TimeoutError: if nothing comes for two minutes.
    """
    load = _Load(case, model)
    streams = [load.stream() for _ in range(case.streams)]
    try:
        load.wait_for_streams()
        load.run(case.concurrency * WARM_UPS)
        started_s = time.perf_counter()
        lines = load.run(case.requests)
        seconds = time.perf_counter() - started_s
    finally:
        for ticket in streams:
            ticket.cancel()
        load.wait_for_ends()
    first = [line.first_ms for line in lines]
    between = [gap for line in lines for gap in line.between_ms]
    return {
        "shape": case.shape,
        "config": case.config.split("kv")[0],
        "kv_bits": int(case.config.partition("kv")[2] or 16),
        "head_bits": case.head_bits,
        "concurrency": case.concurrency,
        "streams": case.streams,
        "prompt": case.prompt,
        "new_tokens": case.new_tokens,
        "requests": len(lines),
        **_quantiles("first_token_ms", first),
        **_quantiles("between_tokens_ms", between),
        "tokens_per_s": round(sum(len(line.token_s) for line in lines) / seconds, 1),
        "goal_ms": case.goal_ms,
    }


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {name: None, f"{name}_p99": None}
    worst = float(np.quantile(values, 0.99))
    return {name: round(statistics.median(values), 2), f"{name}_p99": round(worst, 2)}


class _Load:
    """Sends requests and keeps their times."""

    def __init__(self, case: ServeCase, model: ServedModel) -> None:
        self._case, self._model = case, model
        self._chance = np.random.default_rng(7)
        self._done: queue.SimpleQueue[_Timeline | EngineError] = queue.SimpleQueue()
        self._flowing: queue.SimpleQueue[EngineError | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._streams = 0

    def run(self, requests: int) -> list[_Timeline]:
        """Send so many requests, no more at a time than there are callers."""
        lines: list[_Timeline] = []
        sent = min(requests, self._case.concurrency)
        for _ in range(sent):
            self._send()
        while len(lines) < requests:
            line = _take(self._done)
            if isinstance(line, EngineError):
                raise line
            lines.append(line)
            if sent < requests:
                self._send()
                sent += 1
        return lines

    def stream(self) -> Ticket:
        """Start an answer that goes on until the load ends."""
        ended = False

        def deliver(chunk: GenerationChunk | EngineError) -> None:
            nonlocal ended
            if isinstance(chunk, EngineError):
                self._flowing.put(chunk)
            elif chunk.completion_tokens == 1:
                self._flowing.put(None)
            if not ended and (isinstance(chunk, EngineError) or chunk.finish_reason):
                ended = True
                self._ended.put(None)

        self._streams += 1
        return self._model.engine.submit(self._request(None), deliver)

    def wait_for_streams(self) -> None:
        """Return once every stream has its first token."""
        for _ in range(self._streams):
            error = _take(self._flowing)
            if error is not None:
                raise error

    def wait_for_ends(self) -> None:
        """Return once no stream runs any more."""
        for _ in range(self._streams):
            _take(self._ended)

    def _send(self) -> None:
        line = _Timeline(submitted_s=time.perf_counter())

        def deliver(chunk: GenerationChunk | EngineError) -> None:
            if isinstance(chunk, EngineError):
                self._done.put(chunk)
                return
            line.token_s.append(time.perf_counter())
            if chunk.finish_reason is not None:
                self._done.put(line)

        request = self._request(self._case.new_tokens)
        line.submitted_s = time.perf_counter()
        self._model.engine.submit(request, deliver)

    def _request(self, new_tokens: int | None) -> GenerationRequest:
        ids = self._chance.integers(self._model.vocabulary, size=self._case.prompt)
        return GenerationRequest(
            prompt_ids=tuple(ids.tolist()),
            max_tokens=new_tokens,
            temperature=0.0,
            ignore_eos=True,
        )


def _take(arrivals: "queue.SimpleQueue[Any]") -> Any:
    try:
        return arrivals.get(timeout=PATIENCE_S)
    except queue.Empty as error:
        raise TimeoutError(f"nothing came for {PATIENCE_S:.0f} s") from error
