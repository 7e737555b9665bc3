"""One loaded model that answers requests: what it offers, and how one is opened."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.architecture import check_config
from engine.checkpoint.format import spec_of_section
from engine.checkpoint.reader import load_checkpoint
from engine.inference.batching import BatchingEngine
from engine.inference.decoder.decoder import Decoder
from engine.inference.guides import GuideCompiler
from engine.inference.invariance import check_invariance
from engine.inference.limits import SchedulerLimits
from engine.inference.memory_plan import token_bytes, useful_tokens
from engine.inference.paged_runner import PagedRunner
from engine.inference.request import GenerationChunk, GenerationRequest
from engine.inference.runner_options import RunnerOptions
from engine.inference.runner_start import start_runner
from engine.inference.sampler_state import SamplerState
from engine.inference.text import TextCodec
from engine.inference.ticket import never_cancelled
from engine.models.loading import read_config

__all__ = ["EngineOptions", "InferenceEngine", "kv_bytes_at_most", "open_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is served; the defaults suit one model on its own device."""

    max_sequences: int = 64
    """Answers that are generated at a time."""
    max_step_tokens: int = 2048
    """Tokens of a step: decoded ones, and chunks of prompts."""
    max_waiting: int = 256
    """Answers that wait beyond those."""
    kv_bytes: int | None = None
    """For keys and values; None takes what is free on a GPU, and enough for 16 384 tokens on a
    CPU."""
    context_length: int | None = None
    """Tokens of prompt and answer at most; None for the model's."""
    head_bits: int | None = None
    """8 or 4 rounds the output head; None keeps it as it is stored."""
    draft_tokens: int = 0
    """Guesses a step for greedy answers, from what was said before; never changes an answer."""
    is_batch_invariant: bool = False
    """Refuse a model whose tokens could depend on what else is answered."""


class InferenceEngine(Protocol):
    """One loaded model that answers requests from many threads."""

    text: TextCodec
    """Turns prompts and messages into ids."""
    memory_bytes: int
    """What the model occupies, caches not counted."""
    context_length: int
    """Tokens that prompt and completion may have together."""

    def generate(
        self, request: GenerationRequest, is_cancelled: Callable[[], bool] = never_cancelled
    ) -> Iterator[GenerationChunk]:
        """Answer a request, one chunk a token; the last chunk of an answer has a finish reason.

        Args:
            request: checked before the iterator is returned.
            is_cancelled: asked between tokens; closing the iterator cancels as well.

        Raises:
            ContextLengthExceeded: if prompt and completion do not fit.
            RequestInvalid: if a token id is not in the vocabulary.
            EngineOverloaded: if as much waits as may.
            EngineError: if the model was closed, also while iterating; its message says whether the
                device failed.
        """

    def close(self) -> None:
        """End all generations at their next token and free the model."""


def kv_bytes_at_most(
    directory: Path, options: EngineOptions, device: torch.device | str | None = None
) -> int:
    """Say what keys and values of a checkpoint will take, from its config alone.

    Args:
        directory: the checkpoint.
        options: of the engine.
        device: as for `open_engine`.

    Raises:
        UnsupportedModel: naming the field of the config.
        CheckpointInvalid: if the config says nothing of its bits.
    """
    config = read_config(directory)
    spec = spec_of_section(config)
    architecture = check_config(
        {name: value for name, value in config.items() if name != "quantization_config"}
    )
    longest = min(options.context_length or architecture.max_positions, architecture.max_positions)
    useful = useful_tokens(options.max_sequences, longest)
    useful_bytes = useful * token_bytes(architecture, spec.kv_bits, _dtype_on(device).itemsize)
    return useful_bytes if options.kv_bytes is None else min(options.kv_bytes, useful_bytes)


def open_engine(
    directory: Path,
    device: torch.device | str | None = None,
    options: EngineOptions | None = None,
) -> BatchingEngine:
    """Load a checkpoint directory: bfloat16 activations on a GPU, float32 on a CPU.

    Args:
        directory: the checkpoint.
        device: by default the GPU if there is one.
        options: sizes and choices.

    Raises:
        UnsupportedModel: naming the field of the config.
        CheckpointInvalid: naming the file or tensor that does not fit.
        OutOfMemory: if the device has no room for keys and values.
        BatchesDiffer: if invariance is asked for and cannot be given.
    """
    wanted = options or EngineOptions()
    place = _place_of(device)
    text = TextCodec.from_directory(directory)
    loaded = load_checkpoint(directory, place, _dtype_on(device), prepares=False)
    if wanted.is_batch_invariant:
        check_invariance(loaded.architecture, loaded.spec, wanted.head_bits)
    kv_bits = loaded.spec.kv_bits
    decoder = Decoder.from_loaded(
        loaded, wanted.head_bits, positions=wanted.context_length, launch_pdl=True
    )
    del loaded
    return _serve(decoder, text, kv_bits, wanted)


def _place_of(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _dtype_on(device: torch.device | str | None) -> torch.dtype:
    return torch.float32 if _place_of(device).type == "cpu" else torch.bfloat16


def _serve(
    decoder: Decoder, text: TextCodec, kv_bits: int, options: EngineOptions
) -> BatchingEngine:
    # none is compiled a second time, in the engine's thread, while its request waits or runs
    guides = GuideCompiler(text, kept=options.max_sequences + options.max_waiting)
    sizes = RunnerOptions(
        kv_bits=kv_bits,
        max_sequences=options.max_sequences,
        max_step_tokens=options.max_step_tokens,
        draft_tokens=options.draft_tokens,
        kv_bytes=options.kv_bytes,
    )

    def start(settled: RunnerOptions) -> PagedRunner:
        sampler = SamplerState(
            settled.max_sequences, decoder.vocabulary, decoder.device, guides=guides
        )
        return start_runner(decoder, sampler, settled)

    runner = start(sizes)
    settled = runner.settled
    return BatchingEngine(
        runner,
        text,
        limits=SchedulerLimits(
            max_step_tokens=options.max_step_tokens, max_waiting=options.max_waiting
        ),
        reopen=lambda: start(settled),
        draft_tokens=options.draft_tokens,
        check_guide=guides.check,
    )
