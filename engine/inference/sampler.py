"""Choosing the next token: greedy, temperature, top-k and top-p, one generator a request.

    p = softmax(logits / temperature)  over the top_k likeliest,
    then the fewest likeliest tokens whose p sum to at least top_p, renormalized

Shape legend: V vocabulary.
"""

import torch

from engine.errors import EngineError
from engine.inference.request import GenerationRequest

__all__ = ["Sampler"]


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        # drawn on the CPU, so that a seed means the same on every device
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    def choose(self, logits_V: torch.Tensor) -> int:  # noqa: N803  shape suffix
        """Choose a token id.

        Args:
            logits_V: float ``[V]``, any device.

        Raises:
            EngineError: if a logit is not finite.
        """
        logits_V = logits_V.float().cpu()  # noqa: N806  shape suffix
        if not bool(torch.isfinite(logits_V).all()):
            raise EngineError("the model produced a value that is not finite")
        if self._request.temperature == 0:
            return int(logits_V.argmax())
        kept, ids = self._likeliest(logits_V)
        p = torch.softmax(kept / self._request.temperature, dim=-1)
        # a token stays while those before it have not yet reached top_p
        p = p.where(p.cumsum(-1) - p < self._request.top_p, 0.0)
        return int(ids[torch.multinomial(p, 1, generator=self._generator)])

    def _likeliest(self, logits_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: N803
        """Logits in falling order and their ids."""
        size = logits_V.shape[-1]
        count = min(self._request.top_k or size, size)
        if count == size and self._request.top_p == 1:
            return logits_V, torch.arange(size)
        kept, ids = torch.topk(logits_V, count)
        return kept, ids
