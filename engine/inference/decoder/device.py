"""What a decoder asks of the device that it runs on.

Shape legend: M tokens, K features, Q query heads, D dims of a head.
"""

from typing import Protocol

import torch

from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.operands import InputPasses, Source
from engine.inference.decoder.projection import Matrix
from engine.inference.decoder.stored import FloatLinear, StoredLinear
from kernels.attention import Scoring
from kernels.kv_append import HeadNorms, HeadStates, Rotary
from kernels.kv_pages import KvPages

__all__ = ["Device"]


class Device(Protocol):
    """One device, as the decoder sees it."""

    @property
    def passes(self) -> InputPasses:
        """How operands are made."""

    def matrix(
        self, linear: StoredLinear | FloatLinear, out_dtype: torch.dtype | None = None
    ) -> Matrix:
        """Derive what the device multiplies with; planes are not kept.

        `out_dtype` is that of results where codes are multiplied; None takes the stream's.
        """

    def new_pages(
        self, pages: int, kv_heads: int, head_dim: int, *, kv_bits: int, page_size: int
    ) -> KvPages:
        """Allocate the cache of one layer."""

    def append(
        self,
        states: HeadStates,
        pages: KvPages,
        slots: torch.Tensor,
        rotary: Rotary | None,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        """Normalize, rotate and store; give the queries ``[M, Q, D]``."""

    def attend(
        self,
        query: torch.Tensor,
        pages: KvPages,
        batch: TokenBatch,
        scoring: Scoring,
        biases: torch.Tensor | None,
    ) -> Source:
        """Attend float ``[M, Q, D]`` to the pages, the batch's tokens appended.

        Args:
            query: rotated, in the dtype of the stream.
            pages: of one layer.
            batch: whose tokens these are.
            scoring: scale, window and cap.
            biases: float32 ``[Q, positions]``, added to the scores of every key, or None.

        Returns:
            The outputs of all heads of a token side by side.
        """
