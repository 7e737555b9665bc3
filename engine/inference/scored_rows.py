"""How likely the tokens of scored prompts are, measured in buffers that the host copies.

Shape legend: R rows of logits, V vocabulary.
"""

import torch

from engine.inference.steps import MAX_SCORED_TOKENS
from kernels.token_logprobs import RowLogprobs, measure_logprobs, measure_logprobs_reference

__all__ = ["ScoredRows"]


class ScoredRows:
    """Room for the scores of one step."""

    def __init__(self, device: torch.device) -> None:
        """Allocate."""
        self.logprobs = RowLogprobs.empty(MAX_SCORED_TOKENS, device)
        """Of the last step with scores."""
        self._measure = measure_logprobs if device.type == "cuda" else measure_logprobs_reference
        # the kernel asks the slot of each row whether it is wanted: here all are
        self._wanted = torch.ones(1, dtype=torch.int32, device=device)
        self._slots = torch.zeros(MAX_SCORED_TOKENS, dtype=torch.int64, device=device)

    def measure(self, logits: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Score a token a row.

        Args:
            logits: float ``[R, V]``, V contiguous, R at most `MAX_SCORED_TOKENS`.
            token_ids: int32 ``[R]``.
        """
        slots = self._slots[: len(token_ids)]
        self._measure(logits, token_ids, self._wanted, slots, self.logprobs)
