"""The engine that serves, over a model of random weights and a tokenizer that spells numbers."""

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.random_model import make_random_model
from engine.inference.batching import BatchingEngine
from engine.inference.decoder import Decoder
from engine.inference.limits import SchedulerLimits
from engine.inference.paged_runner import PagedRunner
from engine.inference.runner_options import RunnerOptions
from engine.inference.runner_start import start_runner
from engine.inference.sampler_state import SamplerState
from engine.inference.text import TextCodec
from engine.spec import QuantSpec

__all__ = ["ServedModel", "make_served_model"]


class ServedModel:
    """An engine and the runner beneath it."""

    def __init__(self, runner: PagedRunner) -> None:
        self.memory = runner.memory
        self.vocabulary, self.context_length = runner.vocabulary, runner.context_length
        # prompts are random, so nothing is found again
        limits = SchedulerLimits(is_prefix_cached=False)
        self.engine = BatchingEngine(runner, _spell_numbers(runner.vocabulary), limits=limits)


def make_served_model(
    shape: str,
    notation: str,
    head_bits: int | None,
    device: torch.device,
    options: RunnerOptions,
    *,
    launch_pdl: bool,
) -> ServedModel:
    """Make the model, capture its decode steps, and start the engine.

    Args:
        shape: of `benchmarks.shapes`, or `toy`.
        notation: bits, those of the cache included.
        head_bits: of the output head; None in full precision.
        device: bfloat16 on a GPU, float32 on a CPU.
        options: of the runner; the bits of the cache are taken from `notation`.
        launch_pdl: let kernels start while those before still run.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = make_random_model(shape, QuantSpec.from_notation(notation), device, dtype)
    decoder = Decoder.from_loaded(loaded, head_bits, launch_pdl=launch_pdl)
    sampler = SamplerState(options.max_sequences, decoder.vocabulary, device)
    return ServedModel(start_runner(decoder, sampler, options))


def _spell_numbers(vocabulary: int) -> TextCodec:
    """A token is its own number."""
    words = {str(token_id): token_id for token_id in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))  # noqa: S106  no secret
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    return TextCodec(wrapped, frozenset())
