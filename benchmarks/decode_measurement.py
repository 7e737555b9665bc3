"""Timing one case on the runner that serves: prompts in chunks, then decode steps one ahead."""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.decode_case import DecodeCase, Phase
from benchmarks.kernel_case import MEMORY_BYTES_PER_US
from benchmarks.random_model import make_random_model
from benchmarks.step_split import profile_steps
from engine.inference.decoder import Decoder
from engine.inference.memory_plan import MemoryPlan
from engine.inference.paged_runner import PagedRunner
from engine.inference.runner_options import RunnerOptions
from engine.inference.runner_start import plan_memory
from engine.inference.sampler_state import SamplerState
from engine.inference.sampling_params import SamplingParams
from engine.inference.steps import PendingStep, SequenceStep, StepPlan

__all__ = ["MeasuredModel", "make_model", "measure_case"]

CHUNK = 2048
PAGE_SIZE = 16
WATCHED_STEPS = 8
REPEATS = 5
GREEDY = SamplingParams(temperature=0.0, seed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """A decoder and what of it every step reads."""

    decoder: Decoder
    step_bytes: int
    """Weights but for an embedding of which only a few rows are read."""


def make_model(case: DecodeCase, device: torch.device, *, launch_pdl: bool) -> MeasuredModel:
    """Make the weights of a case: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = make_random_model(case.shape, case.spec, device, dtype)
    embedding = loaded.model.get_parameter(loaded.architecture.embedding_name)
    looked_up = embedding.numel() * dtype.itemsize
    is_read = loaded.architecture.tied and case.head_bits is None
    decoder = Decoder.from_loaded(loaded, case.head_bits, launch_pdl=launch_pdl)
    return MeasuredModel(
        decoder=decoder, step_bytes=decoder.weight_bytes - (0 if is_read else looked_up)
    )


def measure_case(case: DecodeCase, model: MeasuredModel) -> dict[str, Any]:
    """Measure; returns a row."""
    load = _Load(case, model.decoder)
    is_prefill = case.phase is Phase.PREFILL
    ms = load.time_prefill() if is_prefill else load.time_decode()
    tokens = case.context if is_prefill else case.batch
    kv_tokens = 0 if is_prefill else case.batch * (case.context + case.new_tokens // 2)
    split = load.watch(ms)
    read_bytes = model.step_bytes + kv_tokens * load.memory.page_bytes // PAGE_SIZE
    return {
        **_named(case),
        "tokens_per_s": round(tokens / ms * 1e3, 1),
        "ms_per_step": round(ms, 4),
        "bound_ms": round(read_bytes / MEMORY_BYTES_PER_US / 1e3, 4),
        "weight_gb": round(model.decoder.weight_bytes / 1e9, 3),
        "graph_gb": round(load.memory.graph_bytes / 1e9, 3),
        "goal": case.goal,
        "split": None if split is None else split.to_json(),
    }


def _named(case: DecodeCase) -> Mapping[str, Any]:
    return {
        "engine": "abq",
        "shape": case.shape,
        "config": case.config.split("kv")[0],
        "kv_bits": case.spec.kv_bits,
        "head_bits": case.head_bits,
        "phase": case.phase.value,
        "batch": case.batch,
        "context": case.context,
    }


class _Load:
    """Sequences of equal lengths on a runner of their own."""

    def __init__(self, case: DecodeCase, decoder: Decoder) -> None:
        self._case = case
        # a table as wide as the model's context, as a server has it
        longest = case.context + case.new_tokens + WATCHED_STEPS + 2
        own = -(-longest // PAGE_SIZE)
        self._pages = [tuple(range(own * i, own * (i + 1))) for i in range(case.batch)]
        context_pages = -(-decoder.context_length // PAGE_SIZE)
        options = RunnerOptions(
            kv_bits=case.spec.kv_bits,
            max_sequences=case.batch,
            max_step_tokens=CHUNK,
            page_size=PAGE_SIZE,
            pages=max(context_pages, case.batch * own),
            buckets=(case.batch,),
            chunk_graphs=case.phase is Phase.PREFILL,
        )
        sampler = SamplerState(case.batch, decoder.vocabulary, decoder.device)
        plan = plan_memory(decoder, options)
        self._runner = PagedRunner(decoder, sampler, plan, options)
        self._position = 0

    @property
    def memory(self) -> MemoryPlan:
        """What the runner takes."""
        return self._runner.memory

    def time_decode(self) -> float:
        """Milliseconds of a step, from the first token to the last."""
        self._open()
        self._prefill()
        self._decode(2)
        started_s = time.perf_counter()
        steps = self._case.new_tokens
        self._decode(steps)
        return (time.perf_counter() - started_s) / steps * 1e3

    def time_prefill(self) -> float:
        """Milliseconds of the whole prompt, the median of a few."""
        self._open()
        self._prefill()
        times_s = []
        for _ in range(REPEATS):
            started_s = time.perf_counter()
            self._prefill()
            times_s.append(time.perf_counter() - started_s)
        return statistics.median(times_s) * 1e3

    def watch(self, ms: float) -> Any:
        """Split what was timed."""
        if self._case.phase is Phase.PREFILL:
            return profile_steps(self._prefill, 1, ms)
        return profile_steps(lambda: self._decode(WATCHED_STEPS), WATCHED_STEPS, ms)

    def _open(self) -> None:
        for slot in range(self._case.batch):
            self._runner.open(slot, GREEDY, ())

    def _prefill(self) -> None:
        pending: deque[PendingStep] = deque()
        for slot in range(self._case.batch):
            for start in range(0, self._case.context, CHUNK):
                count = min(CHUNK, self._case.context - start)
                ids = tuple((7 * slot + i) % self._runner.vocabulary for i in range(count))
                is_last = start + count == self._case.context
                self._launch(pending, self._step(slot, start, ids, draws=is_last))
        self._drain(pending)
        self._position = self._case.context

    def _decode(self, steps: int) -> None:
        pending: deque[PendingStep] = deque()
        for _ in range(steps):
            slots = range(self._case.batch)
            self._launch(pending, *(self._step(slot, self._position, ()) for slot in slots))
            self._position += 1
        self._drain(pending)

    def _launch(self, pending: deque[PendingStep], *steps: SequenceStep) -> None:
        """Launch one ahead of the results, as the engine does."""
        pending.append(self._runner.launch(StepPlan(steps=steps)))
        if len(pending) > 1:
            pending.popleft().wait()

    def _drain(self, pending: deque[PendingStep]) -> None:
        while pending:
            pending.popleft().wait()

    def _step(
        self, slot: int, start: int, token_ids: tuple[int, ...], *, draws: bool = True
    ) -> SequenceStep:
        return SequenceStep(
            slot=slot,
            start=start,
            token_ids=token_ids,
            page_ids=self._pages[slot],
            draws=draws,
        )
