"""The tokens of one forward pass, as tensors on the decoder's device.

Shape legend: M tokens, B sequences, P pages of a sequence at most, R rows whose logits are wanted.
"""

from dataclasses import dataclass

import torch

__all__ = ["TokenBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """M tokens of B sequences: decoding sequences first, one token each, then chunks of prompts."""

    token_ids: torch.Tensor
    """int32 or int64 ``[M]``."""
    positions: torch.Tensor
    """int32 or int64 ``[M]``."""
    kv_slots: torch.Tensor
    """int64 ``[M]``: page * tokens of a page + offset; a negative one stores nothing."""
    block_table: torch.Tensor
    """int32 ``[B, P]``: pages in order; what lies beyond a sequence is not read."""
    lengths: torch.Tensor
    """int32 ``[B]``: tokens in the cache after this pass; 0 for a row that only pads."""
    decodes: int
    """Sequences of one token."""
    cu_seqlens: torch.Tensor | None = None
    """int32 ``[B - decodes + 1]``: where the tokens of each chunk begin and the last ones end,
    counted from behind the decodes; None where there are decodes alone."""
    logit_rows: torch.Tensor | None = None
    """int64 ``[R]``: tokens whose logits are wanted; None for all."""

    @property
    def tokens(self) -> int:
        """M."""
        return self.token_ids.shape[0]
