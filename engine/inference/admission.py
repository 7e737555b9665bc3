"""What of a request depends on the model: whether its ids exist and its tokens fit; no tensors."""

from collections.abc import Sequence

from engine.errors import CacheExceeded, ContextLengthExceeded
from engine.inference.request import GenerationRequest, RequestInvalid
from engine.inference.sampling_params import Guide

__all__ = ["check_ids", "check_scored", "check_together", "fitting_tokens", "refuse_guide"]


def check_ids(request: GenerationRequest, vocabulary: int) -> None:
    """Refuse ids beyond the embedding: on a GPU they are an illegal access that ends the process.

    Raises:
        RequestInvalid: naming field and id.
    """
    biased = tuple(token_id for token_id, _ in request.logit_bias)
    fields = {
        "prompt": request.prompt_ids,
        "logit_bias": biased,
        "stop_token_ids": request.stop_token_ids,
    }
    for field, ids in fields.items():
        # the two ends decide, and are found without a loop of Python over a long prompt
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < vocabulary:
                raise RequestInvalid(field, token_id, f"use token ids below {vocabulary}")


def fitting_tokens(
    request: GenerationRequest, context_length: int, cache_tokens: int | None = None
) -> int:
    """How many tokens an answer may have.

    Args:
        request: where it says nothing, what fits is filled.
        context_length: of the model.
        cache_tokens: what the key-value cache holds; None where it has no end.

    Raises:
        ContextLengthExceeded: if prompt and answer never fit, whatever else runs.
    """
    limit, error = _limit_of(context_length, cache_tokens)
    prompt = len(request.prompt_ids)
    if prompt >= limit:
        raise error("prompt", prompt, limit)
    if request.max_tokens is None:
        return limit - prompt
    if prompt + request.max_tokens > limit:
        raise error("max_tokens", prompt + request.max_tokens, limit)
    return request.max_tokens


def check_scored(
    request: GenerationRequest, context_length: int, cache_tokens: int | None = None
) -> None:
    """Refuse a prompt that is too long to be scored; limits as for `fitting_tokens`.

    Raises:
        ContextLengthExceeded: if it never fits, whatever else runs.
    """
    limit, error = _limit_of(context_length, cache_tokens)
    if len(request.prompt_ids) > limit:
        raise error("prompt", len(request.prompt_ids), limit)


def check_together(requests: Sequence[GenerationRequest], *, answers: int, tokens: int) -> None:
    """Refuse requests that come as one and never find room, whatever else runs.

    A single one always does: it is taken when nobody waits.

    Args:
        requests: with equal `n`.
        answers: that may run and wait.
        tokens: of prompts that may wait.

    Raises:
        RequestInvalid: naming `n`, or the prompt.
    """
    if len(requests) < 2:
        return
    n, count = requests[0].n, len(requests)
    if count * n > answers:
        fitting = answers // count
        remedy = f"use up to {fitting} for {count} prompts" if fitting else "send fewer prompts"
        raise RequestInvalid("n", n, f"{remedy}: at most {answers} answers find room")
    asked = n * sum(len(each.prompt_ids) for each in requests)
    if asked > tokens:
        raise RequestInvalid(
            "prompt",
            f"{asked} tokens in {count * n} answers",
            f"send fewer prompts at once: at most {tokens} tokens of them find room",
        )


def refuse_guide(guide: Guide) -> None:
    """Refuse every guide, where the engine has no compiler for them.

    Raises:
        RequestInvalid: naming its kind.
    """
    raise RequestInvalid("guide", str(guide.kind), "leave it out: this engine follows no guides")


def _limit_of(
    context_length: int, cache_tokens: int | None
) -> tuple[int, type[ContextLengthExceeded]]:
    """The tighter limit, and what says that it is exceeded."""
    if cache_tokens is not None and cache_tokens < context_length:
        return cache_tokens, CacheExceeded
    return context_length, ContextLengthExceeded
