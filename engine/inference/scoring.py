"""How likely the tokens of a given text are: what evaluation harnesses ask a served model for.

    logprob(token t) = log_softmax(logits behind token t - 1)[token t]

Shape legend: T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from engine.inference.steps import TokenLogprobs

__all__ = ["PromptScorer", "score_tokens"]


@runtime_checkable
class PromptScorer(Protocol):
    """An engine that can score prompts; one that cannot refuses `echo` with `logprobs`."""

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Refuse what `score_prompt` would, without computing anything.

        Raises:
            ContextLengthExceeded: if the prompt never fits context or cache.
            RequestInvalid: if a token id is not in the vocabulary.
        """

    def score_prompt(
        self,
        prompt_ids: Sequence[int],
        top: int,
        is_cancelled: Callable[[], bool],
        *,
        tenant: str = "",
        cache_salt: str | None = None,
    ) -> tuple[TokenLogprobs | None, ...]:
        """Score every token of a prompt; blocks.

        Args:
            prompt_ids: at least one id below the vocabulary's size.
            top: how many of the likeliest tokens to tell at each position.
            is_cancelled: asked between parts; the result is short once it says yes.
            tenant: on whose behalf, as in a `GenerationRequest`.
            cache_salt: for later requests that begin like this prompt, as there.

        Returns:
            One a token; None for the first, which nothing stands before.

        Raises:
            ContextLengthExceeded: if the prompt does not fit.
            RequestInvalid: if an id is not in the vocabulary, or `top` is not possible.
            EngineOverloaded: if as much waits as may.
            EngineError: if the model was closed meanwhile or the device failed.
        """


def score_tokens(
    logits_TV: torch.Tensor,  # noqa: N803  shape suffix
    token_ids: Sequence[int],
    top: int,
) -> list[TokenLogprobs]:
    """Look up how likely tokens were.

    Args:
        logits_TV: float ``[T, V]``, any device; row t predicts ``token_ids[t]``.
        token_ids: T ids.
        top: how many of the likeliest to tell, at most V.
    """
    scores_TV = torch.log_softmax(logits_TV.float(), dim=-1)  # noqa: N806  shape suffix
    drawn = scores_TV.gather(1, _column(token_ids, scores_TV.device))[:, 0]
    values, ids = torch.topk(scores_TV, min(top, scores_TV.shape[-1]))
    rows = zip(token_ids, drawn.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(zip(*best, strict=True)))
        for token_id, logprob, *best in rows
    ]


def _column(token_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([*token_ids], dtype=torch.int64, device=device)[:, None]
