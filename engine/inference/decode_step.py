"""The decode step that is captured: the next token of every row, over buffers of the device.

Shape legend: V vocabulary.
"""

import torch

from engine.inference.decoder.batch import TokenBatch
from engine.inference.draw_kind import DrawKind
from engine.inference.ports import TokenDecoder, TokenSampler
from kernels.kv_pages import KvPages
from kernels.step_state import BatchRows, SequenceState, advance_rows, record_tokens

__all__ = ["DecodeStep"]


class DecodeStep:
    """Knows no plan: which rows there are stands in the state."""

    def __init__(
        self,
        decoder: TokenDecoder,
        sampler: TokenSampler,
        pages: tuple[KvPages, ...],
        state: SequenceState,
        drawn: torch.Tensor,
    ) -> None:
        """Allocate the rows of a batch.

        Args:
            decoder: the model.
            sampler: draws the tokens.
            pages: of every layer.
            state: of all slots; written to.
            drawn: int32, for the tokens of a step.
        """
        self._decoder, self._sampler = decoder, sampler
        self._pages, self._state, self._drawn = pages, state, drawn
        self._page_size = pages[0].page_size
        self._rows = BatchRows.allocate(*state.block_table.shape, device=state.words.device)

    def forward(self, rows: int) -> torch.Tensor:
        """Compute the first rows: logits ``[rows, V]``."""
        batch = self._rows.first(rows)
        advance_rows(self._state, batch, page_size=self._page_size)
        tokens = TokenBatch(
            token_ids=batch.token_ids,
            positions=batch.positions,
            kv_slots=batch.kv_slots,
            block_table=batch.block_table,
            lengths=batch.lengths,
            decodes=rows,
        )
        return self._decoder.forward(tokens, self._pages)

    def draw(self, logits: torch.Tensor, kind: DrawKind) -> None:
        """Draw a token for each of them, and record it."""
        slots = self._rows.slots[: logits.shape[0]]
        tokens = self._sampler.draw(logits, slots, full=kind.is_full, limited=kind.is_limited)
        record_tokens(self._state, slots, tokens, self._drawn)
