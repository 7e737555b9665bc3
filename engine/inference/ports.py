"""What a runner needs of a decoder and of what draws tokens."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from engine.errors import GuideFailed
from engine.inference.decoder.batch import TokenBatch
from engine.inference.sampling_params import SamplingParams
from kernels.kv_pages import KvPages
from kernels.token_logprobs import RowLogprobs

__all__ = ["TokenDecoder", "TokenSampler"]


class TokenDecoder(Protocol):
    """A model over paged keys and values."""

    @property
    def vocabulary(self) -> int:
        """V."""

    @property
    def context_length(self) -> int:
        """Positions."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def weight_bytes(self) -> int:
        """What it holds there."""

    @property
    def chunks_wait(self) -> bool:
        """Whether chunks of prompts wait for the host, so that no graph can hold them."""

    def new_pages(self, pages: int, *, kv_bits: int, page_size: int = 16) -> tuple[KvPages, ...]:
        """Allocate the cache, one entry a layer."""

    def forward(self, batch: TokenBatch, pages: tuple[KvPages, ...]) -> torch.Tensor:
        """Compute logits ``[R, V]``; a CUDA graph can capture decodes, and chunks that do not wait.

        Tokens behind the last chunk are no sequence's: what they hold reaches no other.
        """


class TokenSampler(Protocol):
    """Draws tokens; keeps what a request asks for by slot, on the device."""

    @property
    def memory_bytes(self) -> int:
        """What it keeps on the device."""

    pad_slot: int
    """Of rows that only fill a batch up; the number behind the last slot."""
    logprobs: RowLogprobs
    """Of the last full draw."""

    def open(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        drawn_ids: Sequence[int] = (),
    ) -> None:
        """Take up a sequence."""

    def close(self, slot: int) -> None:
        """Forget it."""

    def send_guides(self, slots: Iterable[int]) -> None:
        """Send what the guides of these slots allow, before the draw that looks at it."""

    def accept(self, slot: int, token_ids: Sequence[int]) -> GuideFailed | None:
        """Let the guide of a slot go on by tokens that the host has read; why it cannot."""

    def draw(
        self, logits: torch.Tensor, slots: torch.Tensor, *, full: bool, limited: bool
    ) -> torch.Tensor:
        """Draw int32 ``[R]`` from logits ``[R, V]`` for slots int64 ``[R]``."""
