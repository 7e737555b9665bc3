"""One model and its forward passes: no policy, no text."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from engine.checkpoint.reader import LoadedModel
from engine.inference.kv_cache import make_cache

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs tokens through a model; every request brings its own cache."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._layers = loaded.architecture.layers
        self._kv_bits = loaded.spec.kv_bits
        self._device = next(loaded.model.parameters()).device
        self.context_length = loaded.architecture.max_positions
        self.vocabulary = loaded.architecture.vocab

    def new_cache(self) -> Cache:
        """Make an empty cache, quantized as the spec says."""
        return make_cache(self._layers, self._kv_bits)

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int], cache: Cache) -> torch.Tensor:
        """Append tokens to a request: its prompt or a part of it, or the token just chosen.

        Args:
            token_ids: at least one id below the vocabulary's size.
            cache: of this request; grows by these tokens.

        Returns:
            Logits of the token that follows: float ``[V]`` on the model's device.
        """
        return self._logits(token_ids, cache, 1)[-1]

    @torch.inference_mode()
    def extend_all(self, token_ids: Sequence[int], cache: Cache) -> torch.Tensor:
        """As `extend`, with the logits behind every token.

        Returns:
            Float ``[T, V]`` on the model's device, for T tokens.
        """
        return self._logits(token_ids, cache, 0)

    def _logits(self, token_ids: Sequence[int], cache: Cache, kept: int) -> torch.Tensor:
        """Logits behind the last `kept` tokens; 0 keeps all."""
        ids = torch.tensor([list(token_ids)], device=self._device)
        output = self._model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept
        )
        logits: torch.Tensor = output.logits
        return logits[0]
