"""Generation one token at a time through the transformers model itself: the reference.

Every linear is the quantized module and everything between is the code of transformers, so what the
batching engine answers can be compared with it. It serves nobody.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.cache_utils import Cache

from engine.checkpoint.reader import load_checkpoint
from engine.errors import EngineError
from engine.inference.admission import check_ids, check_scored, fitting_tokens
from engine.inference.answer import Answer
from engine.inference.request import GenerationChunk, GenerationRequest, RequestInvalid
from engine.inference.runner import ModelRunner
from engine.inference.sampler import Sampler
from engine.inference.scoring import score_tokens
from engine.inference.steps import TokenLogprobs
from engine.inference.text import TextCodec
from engine.inference.ticket import never_cancelled

__all__ = ["SequentialEngine", "open_reference"]

PREFILL_TOKENS = 512
"""A prompt enters in parts of this size; other requests get their turn between two."""
SCORED_TOKENS = 128
"""The same for prompts that are scored, whose logits are kept: 64 MB for 128000 tokens."""
UNSUPPORTED = (
    "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "min_tokens", "n", "guide",
)  # fmt: skip
"""Fields that `SequentialEngine` refuses; whom requests are for changes nothing here."""


def open_reference(directory: Path, device: torch.device | str = "cpu") -> "SequentialEngine":
    """Load a checkpoint directory: bfloat16 activations on a GPU, float32 on a CPU.

    Raises:
        UnsupportedModel: naming the field of the config.
        CheckpointInvalid: naming the file or tensor that does not fit.
    """
    place = torch.device(device)
    loaded = load_checkpoint(
        directory, place, torch.float32 if place.type == "cpu" else torch.bfloat16
    )
    text = TextCodec.from_directory(directory)
    return SequentialEngine(ModelRunner(loaded), text, loaded.memory_bytes)


class SequentialEngine:
    """Runs one step at a time; concurrent requests take turns token by token."""

    def __init__(self, runner: ModelRunner, text: TextCodec, memory_bytes: int) -> None:
        self.text = text
        self.memory_bytes = memory_bytes
        self.context_length = runner.context_length
        self._runner: ModelRunner | None = runner
        self._turn = threading.Lock()

    def generate(
        self, request: GenerationRequest, is_cancelled: Callable[[], bool] = never_cancelled
    ) -> Iterator[GenerationChunk]:
        """See `InferenceEngine.generate`."""
        runner = self._live_runner()
        _check_supported(request)
        check_ids(request, runner.vocabulary)
        max_tokens = fitting_tokens(request, runner.context_length)
        answer = Answer(request, max_tokens, self.text)
        return self._chunks(request, answer, runner.new_cache(), is_cancelled)

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """See `PromptScorer.check_prompt`."""
        runner = self._live_runner()
        request = GenerationRequest(prompt_ids=tuple(prompt_ids))
        check_ids(request, runner.vocabulary)
        check_scored(request, runner.context_length)

    def score_prompt(
        self,
        prompt_ids: Sequence[int],
        top: int,
        is_cancelled: Callable[[], bool],
        *,
        tenant: str = "",
        cache_salt: str | None = None,
    ) -> tuple[TokenLogprobs | None, ...]:
        """See `PromptScorer.score_prompt`; requests share nothing here."""
        self.check_prompt(prompt_ids)
        runner = self._live_runner()
        cache, scores = runner.new_cache(), list[TokenLogprobs | None]([None])
        for start in range(0, len(prompt_ids), SCORED_TOKENS):
            if is_cancelled():
                break
            part = prompt_ids[start : start + SCORED_TOKENS]
            with self._turn:
                logits = self._live_runner().extend_all(part, cache)
            following = prompt_ids[start + 1 : start + 1 + len(part)]
            scores += score_tokens(logits[: len(following)], following, top)
        return tuple(scores)

    def close(self) -> None:
        """See `InferenceEngine.close`."""
        with self._turn:
            self._runner = None

    def _chunks(
        self,
        request: GenerationRequest,
        answer: Answer,
        cache: Cache,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[GenerationChunk]:
        sampler = Sampler(request)
        logits = self._prefill(request, cache, is_cancelled)
        while logits is not None:
            token_id = sampler.choose(logits)
            chunk = replace(answer.accept(token_id), token_id=token_id)
            if request.logprobs is not None:
                [score] = score_tokens(logits[None], [token_id], request.logprobs)
                chunk = replace(chunk, logprobs=score)
            yield chunk
            if chunk.finish_reason is not None:
                return
            logits = None if is_cancelled() else self._extend([token_id], cache)
        yield answer.cancel()

    def _prefill(
        self, request: GenerationRequest, cache: Cache, is_cancelled: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Logits behind the prompt, or None if the caller went away."""
        ids, logits = list(request.prompt_ids), None
        for start in range(0, len(ids), PREFILL_TOKENS):
            if is_cancelled():
                return None
            logits = self._extend(ids[start : start + PREFILL_TOKENS], cache)
        return logits

    def _extend(self, token_ids: list[int], cache: Cache) -> torch.Tensor:
        with self._turn:
            return self._live_runner().extend(token_ids, cache)

    def _live_runner(self) -> ModelRunner:
        if self._runner is None:
            raise EngineError("the model was unloaded")
        return self._runner


def _check_supported(request: GenerationRequest) -> None:
    defaults = GenerationRequest(prompt_ids=request.prompt_ids)
    for field in UNSUPPORTED:
        if (value := getattr(request, field)) != getattr(defaults, field):
            raise RequestInvalid(field, value, "leave it out: this engine has no such field")
