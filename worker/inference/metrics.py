"""Prometheus metrics with vLLM's names under the prefix `abq:`, so that its dashboards fit.

Times are measured in this process; what only an engine knows is read from it when asked for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from worker.inference.activity import statistics_of
from worker.inference.entry import Entry, ModelLabels

__all__ = ["InferenceMetrics"]

PREFIX = "abq:"
LABELS = tuple(each.name for each in fields(ModelLabels))
TOKEN_BUCKETS_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = MappingProxyType({
    "time_to_first_token_seconds": ("From admission to the first token.", REQUEST_BUCKETS_S),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", TOKEN_BUCKETS_S),
    "request_time_per_output_token_seconds": (
        "Of an answer: decode time by tokens behind the first.", TOKEN_BUCKETS_S,
    ),
    "e2e_request_latency_seconds": ("From admission to the last token.", REQUEST_BUCKETS_S),
    "request_queue_time_seconds": ("From admission to the first step.", REQUEST_BUCKETS_S),
    "request_prefill_time_seconds": ("From the first step to the first token.", REQUEST_BUCKETS_S),
    "request_decode_time_seconds": ("From the first token to the last.", REQUEST_BUCKETS_S),
})  # fmt: skip
GAUGES = (
    ("num_requests_running", "running", "Generations that run."),
    ("num_requests_waiting", "waiting", "Generations that wait."),
    ("kv_cache_usage_perc", "kv_usage", "Part of the key-value cache in use, 0 to 1."),
)
COUNTERS = (
    ("prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_hits", "Prompt tokens found there."),
    ("num_preemptions", "preemptions", "Generations that gave their cache to others."),
    ("spec_decode_num_draft_tokens", "drafts_proposed", "Tokens guessed ahead."),
    ("spec_decode_num_accepted_tokens", "drafts_accepted", "Guesses that were right."),
)


class InferenceMetrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self, entries: Callable[[], Iterable[Entry]]) -> None:
        """Start at zero.

        Args:
            entries: the models in memory at the moment.
        """
        self.registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                PREFIX + name, text, LABELS, buckets=tuple(buckets), registry=self.registry
            )
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._prompt = self._counter("prompt_tokens", "Tokens read.")
        self._generation = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._counter("request_success", "Answers ended.", "finished_reason")
        self.registry.register(_EngineCollector(entries))

    def observe(self, name: str, labels: ModelLabels, seconds: float) -> None:
        """Add to one of the histograms."""
        self._histograms[name].labels(*astuple(labels)).observe(seconds)

    def count_prompt(self, labels: ModelLabels, tokens: int) -> None:
        """Count tokens of prompts that were taken."""
        self._prompt.labels(*astuple(labels)).inc(tokens)

    def count_generated(self, labels: ModelLabels, tokens: int) -> None:
        """Count tokens of answers."""
        self._generation.labels(*astuple(labels)).inc(tokens)

    def count_end(self, labels: ModelLabels, reason: str) -> None:
        """Count an answer that came to its end."""
        self._success.labels(*astuple(labels), reason).inc()

    def render(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(PREFIX + name, text, (*LABELS, *more), registry=self.registry)


class _EngineCollector(Collector):
    """Asks the engines whenever metrics are asked for."""

    def __init__(self, entries: Callable[[], Iterable[Entry]]) -> None:
        self._entries = entries

    @override
    def collect(self) -> Iterable[Metric]:
        """Read every model in memory once."""
        read = [
            (astuple(entry.labels), _counted(entry))
            for entry in self._entries()
            if entry.labels is not None and entry.engine is not None
        ]
        for kind, families in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, key, text in families:
                family = kind(PREFIX + name, text, labels=LABELS)
                for labels, counts in read:
                    family.add_metric(labels, counts[key])
                yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing: else the registry would ask the engines as soon as it is made."""
        return ()


def _counted(entry: Entry) -> Mapping[str, float]:
    counts = {key: 0.0 for _, key, _ in (*GAUGES, *COUNTERS)}
    running, waiting = entry.load()
    found = statistics_of(entry.engine)
    if found is not None:
        counts |= {key: float(getattr(found, key)) for key in counts}
    return {**counts, "running": running, "waiting": waiting}
