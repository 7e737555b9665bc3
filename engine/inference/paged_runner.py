"""One decoder on one device: runs plans over paged keys and values, without policy.

A step in which every sequence decodes is a replay of CUDA graphs over buffers that live on the
device (`decode_graphs`, `kernels.step_state`): lengths advance there and tokens stay there, so
nothing is sent while the same sequences go on, but for a page now and then. Chunks of prompts alone
are filled up and replayed too (`chunk_graphs`); beside decoding sequences, scored or with drafts to
verify, they run launch by launch. A launch returns before the device is done; tokens come back by a
copy beside the steps (`step_results`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from engine.inference.chunk_graphs import ChunkGraphs, chunk_sizes
from engine.inference.decode_graphs import DecodeGraphs
from engine.inference.decode_step import DecodeStep
from engine.inference.draw_kind import DrawKind
from engine.inference.graph_pool import capture_graphs
from engine.inference.memory_plan import MemoryPlan
from engine.inference.mixed_batch import MixedBatch
from engine.inference.mixed_forward import MixedForward
from engine.inference.mixed_step import MixedStep
from engine.inference.open_slots import OpenSlots
from engine.inference.ports import TokenDecoder, TokenSampler
from engine.inference.runner_options import RunnerOptions
from engine.inference.sampling_params import SamplingParams
from engine.inference.scored_rows import ScoredRows
from engine.inference.step_buffers import HostArena, StepBuffers, make_arenas
from engine.inference.step_results import LaunchedStep, Reading, StepResults
from engine.inference.steps import MAX_DRAFTS, MAX_SCORED_TOKENS, SequenceStep, StepPlan
from kernels.step_state import SequenceState

__all__ = ["PagedRunner"]

ARENAS = 2
INTS_PER_TOKEN = 4
"""Ids, positions, slots and rows of logits of a mixed step."""
INTS_PER_SEQUENCE = 6 + 4 * MAX_DRAFTS
"""Slots, lengths and the like, these for every draft too, and a table of drafts."""


class PagedRunner:
    """A `engine.inference.steps.Runner`; one thread at a time."""

    def __init__(
        self,
        decoder: TokenDecoder,
        sampler: TokenSampler,
        plan: MemoryPlan,
        options: RunnerOptions,
    ) -> None:
        """Allocate pages and buffers, then capture; see `runner_start.start_runner`.

        Args:
            decoder: the model.
            sampler: of as many slots as sequences, and draws of as many rows.
            plan: how many pages.
            options: sizes.
        """
        self.max_sequences = options.max_sequences
        self.page_size, self.pages = options.page_size, plan.pages
        self.context_length = min(
            options.context_length or decoder.context_length,
            decoder.context_length,
            plan.pages * options.page_size,
        )
        self.vocabulary = decoder.vocabulary
        self._decoder, self._sampler, self._options = decoder, sampler, options
        self._device = decoder.device
        # torch keeps launches of one stream in order, and other models use streams of their own
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        if self._stream is not None:
            # weights may still be on their way
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._open = OpenSlots()
        with self._in_stream():
            self._allocate(plan)
        graph_bytes = self._capture() if on_gpu and options.use_graphs else 0
        self.memory = replace(plan, graph_bytes=graph_bytes, sampler_bytes=sampler.memory_bytes)
        self.memory_bytes = self.memory.total_bytes

    @property
    def settled(self) -> RunnerOptions:
        """Options that make a runner of the same shape again, whatever memory is free then."""
        return replace(self._options, pages=self.pages)

    def open(
        self,
        slot: int,
        sampling: SamplingParams,
        prompt_ids: Sequence[int],
        drawn_ids: Sequence[int] = (),
    ) -> None:
        """See `engine.inference.steps.Runner.open`.

        Raises:
            ValueError: if the slot is taken or there is none of that number.
        """
        if not 0 <= slot < self.max_sequences or slot in self._open:
            raise ValueError(f"slot = {slot}: use a free one below {self.max_sequences}")
        self._buffers.forget(slot)
        with self._in_stream():
            self._sampler.open(slot, sampling, prompt_ids, drawn_ids)
        self._open.add(slot, sampling)

    def close(self, slot: int) -> None:
        """See `engine.inference.steps.Runner.close`."""
        if slot in self._open:
            self._open.remove(slot)
            with self._in_stream():
                self._sampler.close(slot)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """See `engine.inference.steps.Runner.launch`.

        Raises:
            ValueError: naming the step that does not fit; nothing has been launched then.
        """
        self._check(plan)
        with self._in_stream(), torch.inference_mode():
            arena = next(self._arenas)
            arena.begin()
            if plan.is_decode:
                return self._launch_decode(plan.steps, arena)
            return self._launch_mixed(plan, arena)

    def _launch_decode(self, steps: tuple[SequenceStep, ...], arena: HostArena) -> LaunchedStep:
        rows = self._graphs.rows_for(len(steps))
        self._buffers.choose_rows([step.slot for step in steps], rows)
        for step in steps:
            self._buffers.place(step, advances=True)
        placed = self._buffers.pack(arena)
        self._buffers.apply(arena.send(), placed)
        self._graphs.forward(rows)
        self._results.allow_writing()
        self._graphs.draw(rows, self._prepare_draw(steps))
        return self._results.read(self._reading(steps))

    def _launch_mixed(self, plan: StepPlan, arena: HostArena) -> LaunchedStep:
        batch = MixedBatch.of(plan, self.page_size)
        for step in plan.steps:
            self._buffers.place(step, advances=False)
        computed = self._mixed.forward(batch, arena)
        self._results.allow_writing()
        self._mixed.draw(computed, self._prepare_draw(batch.drawing))
        return self._results.read(self._reading(batch.drawing, batch.drafting, batch.scoring))

    def _allocate(self, plan: MemoryPlan) -> None:
        options, device, scratch = self._options, self._device, plan.pages
        decoder, sampler = self._decoder, self._sampler
        slots = options.max_sequences + 1
        assert sampler.pad_slot == slots - 1, "rows that fill up have one slot, here and there"
        tokens = slots + options.max_step_tokens
        per_sequence = -(-self.context_length // options.page_size)
        self.kv_pages = decoder.new_pages(
            plan.pages + 1, kv_bits=options.kv_bits, page_size=options.page_size
        )
        state = SequenceState.allocate(slots, per_sequence, scratch_page=scratch, device=device)
        drawn = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._buffers = StepBuffers(state, options.page_size)
        ints = 2 * len(state.words) + INTS_PER_SEQUENCE * slots + INTS_PER_TOKEN * tokens
        ints += MAX_SCORED_TOKENS
        self._arenas = cycle(make_arenas(ARENAS, ints, device))
        scored = ScoredRows(device)
        self._results = StepResults(drawn, sampler.logprobs, scored.logprobs, sampler.accept)
        # neither knows the runner: without a cycle its memory is free as soon as it is dropped
        step = DecodeStep(decoder, sampler, self.kv_pages, state, drawn)
        self._graphs = DecodeGraphs(step, options.buckets_on(device.type))
        forward = MixedForward(decoder, self.kv_pages, state)
        self._chunks = ChunkGraphs(forward, chunk_sizes(decoder, options))
        self._mixed = MixedStep(forward, self._chunks, sampler, self._buffers, drawn, scored)

    def _capture(self) -> int:
        """Capture all steps; returns bytes that the graphs hold."""
        with self._in_stream(), torch.inference_mode():
            chunks = partial(self._chunks.capture, next(self._arenas))
            return capture_graphs(self._device, chunks, self._graphs.capture)

    def _prepare_draw(self, steps: tuple[SequenceStep, ...]) -> DrawKind:
        guided = self._open.guided(steps)
        if guided:
            self._sampler.send_guides(guided)
        return self._open.kind_of(steps)

    def _reading(
        self,
        drawing: tuple[SequenceStep, ...],
        drafting: tuple[SequenceStep, ...] = (),
        scoring: tuple[SequenceStep, ...] = (),
    ) -> Reading:
        return Reading(
            drawing=drawing,
            drafting=drafting,
            scoring=scoring,
            tops=self._open.tops(drawing),
            guided=self._open.guided(drawing),
        )

    def _check(self, plan: StepPlan) -> None:
        if not plan.steps:
            raise ValueError("steps = (): plan at least one")
        tokens = sum(step.count for step in plan.steps)
        most = self._options.max_step_tokens + self.max_sequences
        if tokens > most:
            raise ValueError(f"a plan of {tokens} tokens: plan at most {most}")
        scored = sum(len(step.score_ids) for step in plan.steps)
        if scored > MAX_SCORED_TOKENS:
            raise ValueError(
                f"a plan that scores {scored} tokens: score at most {MAX_SCORED_TOKENS}"
            )
        if len({step.slot for step in plan.steps}) < len(plan.steps):
            raise ValueError("a slot has two steps in one plan: plan one a launch")
        for step in plan.steps:
            self._check_step(step)

    def _check_step(self, step: SequenceStep) -> None:
        end = step.start + step.count
        if step.slot not in self._open:
            raise ValueError(f"slot = {step.slot}: open it first")
        if not 0 <= step.start < end <= self.context_length:
            raise ValueError(f"slot {step.slot}: position {end} of {self.context_length}")
        if end > len(step.page_ids) * self.page_size:
            raise ValueError(f"slot {step.slot}: {len(step.page_ids)} pages for {end} tokens")
        # an id beyond the embedding would be an illegal access, which ends the process
        ids = (*step.token_ids, *step.score_ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise ValueError(f"slot {step.slot}: token ids must be below {self.vocabulary}")
        if step.drafts and not (step.draws and self._open.can_verify(step.slot)):
            raise ValueError(f"slot {step.slot}: drafts are for greedy sequences that draw")
        if step.drafts > MAX_DRAFTS:
            raise ValueError(f"slot {step.slot}: {step.drafts} drafts, verify at most {MAX_DRAFTS}")
        if step.score_ids and (step.draws or len(step.score_ids) > len(step.token_ids)):
            raise ValueError(
                f"slot {step.slot}: {len(step.score_ids)} scores behind {len(step.token_ids)} given"
                " tokens: score at most as many, in steps that draw nothing"
            )

    def _in_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
