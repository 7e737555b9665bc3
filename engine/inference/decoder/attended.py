"""What attention gives on a GPU, quantized as the output product wants it.

Shape legend: M tokens, Q query heads, D dims of a head.
"""

from dataclasses import dataclass, field, replace

import torch

from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.launches import prefill_config
from engine.inference.decoder.operands import InputPasses, Operand, Reading
from kernels import attended_tokens as attended
from kernels import paged_attention as decode
from kernels import paged_prefill as prefill
from kernels.attention import PagedContext, Scoring
from kernels.kv_pages import KvPages

__all__ = ["AttendedSource"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedSource:
    """The outputs of all heads of a token side by side."""

    passes: InputPasses
    query: torch.Tensor
    """``[M, Q, D]``, rotated."""
    pages: KvPages
    batch: TokenBatch
    scoring: Scoring
    launch_pdl: bool
    slots: torch.Tensor
    """Where programs that share a token meet."""
    _made: dict[Reading, Operand] = field(default_factory=dict)

    def read(self, reading: Reading) -> Operand:
        """The outputs in a form."""
        if reading not in self._made:
            fuses = self.batch.cu_seqlens is None and not (reading.is_values or reading.hadamard)
            made = self._codes(reading) if fuses else self.passes.plain(self._values(), reading)
            self._made[reading] = made
        return self._made[reading]

    def _codes(self, reading: Reading) -> Operand:
        query = self.query
        chosen = attended.select_config(query.shape[1])
        return attended.attended_tokens(
            query,
            self.pages,
            self._context,
            self.scoring,
            reading.form,
            attention_config=self._decode_config,
            config=replace(chosen, launch_pdl=self.launch_pdl),
            slots=self.slots,
        )

    def _values(self) -> torch.Tensor:
        """Decoding sequences by one kernel, chunks of prompts by another: ``[M, Q D]``."""
        out = self.query.new_empty(self.query.shape)
        first = len(out) if self.batch.cu_seqlens is None else self.batch.decodes
        if first:
            decode.paged_attention(
                self.query[:first],
                self.pages,
                _part(self._context, 0, first),
                self.scoring,
                out=out[:first],
                config=self._decode_config,
            )
        if self.batch.cu_seqlens is not None:
            self._prefill(self.batch.cu_seqlens, first, out)
        return out.view(len(out), -1)

    def _prefill(self, cu_seqlens: torch.Tensor, first: int, out: torch.Tensor) -> None:
        tokens, heads, head_dim = self.query[first:].shape
        group = heads // self.pages.kv_heads
        prefill.paged_prefill(
            self.query[first:],
            self.pages,
            _part(self._context, first, len(self.batch.lengths)),
            self.scoring,
            cu_seqlens,
            out=out[first:],
            config=prefill_config(tokens, group, head_dim, overlaps=self.launch_pdl),
        )

    @property
    def _context(self) -> PagedContext:
        return PagedContext(block_table=self.batch.block_table, lengths=self.batch.lengths)

    @property
    def _decode_config(self) -> decode.LaunchConfig:
        longest = self.batch.block_table.shape[1] * self.pages.page_size
        group = self.query.shape[1] // self.pages.kv_heads
        chosen = decode.select_config(self.pages, longest, group=group)
        return replace(chosen, pdl=self.launch_pdl)


def _part(context: PagedContext, start: int, stop: int) -> PagedContext:
    return PagedContext(
        block_table=context.block_table[start:stop], lengths=context.lengths[start:stop]
    )
