"""The forward pass of a mixed batch: where its parts lie in an arena, and what is computed of them.

Shape legend: R rows of logits, V vocabulary.
"""

from collections.abc import Mapping

import torch

from engine.inference.decoder.batch import TokenBatch
from engine.inference.mixed_batch import MixedBatch
from engine.inference.ports import TokenDecoder
from engine.inference.step_buffers import HostArena
from kernels.kv_pages import KvPages
from kernels.step_state import SequenceState

__all__ = ["MixedForward", "add_parts"]

PARTS = ("token_ids", "positions", "kv_slots", "slots", "lengths", "cu_seqlens", "logit_rows")


def add_parts(batch: MixedBatch, arena: HostArena) -> dict[str, slice]:
    """Append the parts of a batch: in an empty arena their places depend on their sizes alone."""
    return {name: arena.add(getattr(batch, name)) for name in PARTS}


class MixedForward:
    """A decoder over the pages and the state of a runner."""

    def __init__(
        self, decoder: TokenDecoder, pages: tuple[KvPages, ...], state: SequenceState
    ) -> None:
        self._decoder, self._pages, self.state = decoder, pages, state

    def compute(
        self, sent: torch.Tensor, places: Mapping[str, slice], *, decodes: int = 0
    ) -> torch.Tensor:
        """Compute logits ``[R, V]``, launch by launch.

        Args:
            sent: int32, an arena on the device.
            places: of the parts therein.
            decodes: sequences of one token, which come first.
        """
        return self._decoder.forward(self._lay_out(sent, places, decodes), self._pages)

    def _lay_out(self, sent: torch.Tensor, places: Mapping[str, slice], decodes: int) -> TokenBatch:
        parts = {name: sent[place] for name, place in places.items()}
        slots, token_ids = parts["slots"].long(), parts["token_ids"]
        if decodes:
            given, drawn = token_ids[:decodes], self.state.last_tokens[slots[:decodes]]
            token_ids = torch.cat([torch.where(given < 0, drawn, given), token_ids[decodes:]])
        return TokenBatch(
            token_ids=token_ids,
            positions=parts["positions"],
            kv_slots=parts["kv_slots"].long(),
            block_table=self.state.block_table[slots],
            lengths=parts["lengths"],
            cu_seqlens=parts["cu_seqlens"] if decodes < len(slots) else None,
            decodes=decodes,
            logit_rows=parts["logit_rows"].long(),
        )
