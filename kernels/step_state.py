"""What a device remembers of the sequences it decodes, and the tiny kernels that keep it.

    write      words[offset_i] = value_i
    advance    s = rows[b], n = lengths[s]:  token_ids[b] = last_tokens[s],  positions[b] = n,
               kv_slots[b] = T block_table[s, n // T] + n mod T,  lengths of the batch [b] = n + 1,
               block table of the batch [b] = that of s so far,   lengths[s] = n + 1
    record     drawn[b] = token b,  last_tokens[slot b] = max(0, token b)

One int32 vector holds everything, so that one copy and one launch change any of it:

    words      lengths S | last tokens S | rows S | block table S P

The last slot is scratch: rows that only fill a batch up name it. Its length stays 0, its pages are
one page that no sequence has. A token of -1 could not be drawn; it is reported, and its sequence
goes on with token 0, which at least lies in the embedding, until somebody ends it.

Shape legend: S slots with the scratch one, P pages of a sequence, T tokens of a page, B rows of a
batch.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl

__all__ = ["BatchRows", "SequenceState", "advance_rows", "record_tokens", "write_words"]

WRITE_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceState:
    """Lengths, last tokens, rows of the present batch and block table, all of them int32 views."""

    words: torch.Tensor
    """``[3 S + S P]``, which the others are parts of."""
    lengths: torch.Tensor
    """``[S]``: tokens in the pages of a slot."""
    last_tokens: torch.Tensor
    """``[S]``: drawn last, not in the pages yet."""
    rows: torch.Tensor
    """``[S]``: the slot of every row of the batch, the scratch slot behind them."""
    block_table: torch.Tensor
    """``[S, P]``: pages in order."""

    @classmethod
    def allocate(
        cls, slots: int, pages: int, *, scratch_page: int, device: torch.device | str
    ) -> Self:
        """Allocate empty slots; the last is scratch, and every page is the scratch page."""
        words = torch.zeros(slots * (3 + pages), dtype=torch.int32, device=device)
        lengths, last_tokens, rows = words[: 3 * slots].view(3, slots)
        table = words[3 * slots :]
        rows.fill_(slots - 1)
        table.fill_(scratch_page)
        return cls(
            words=words,
            lengths=lengths,
            last_tokens=last_tokens,
            rows=rows,
            block_table=table.view(slots, pages),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRows:
    """What a decoding batch of B rows computes."""

    slots: torch.Tensor
    """int64 ``[B]``: whose rows these are."""
    token_ids: torch.Tensor
    """int32 ``[B]``."""
    positions: torch.Tensor
    """int32 ``[B]``."""
    kv_slots: torch.Tensor
    """int64 ``[B]``."""
    lengths: torch.Tensor
    """int32 ``[B]``, the present token included."""
    block_table: torch.Tensor
    """int32 ``[B, P]``, rows adjacent; valid as far as a sequence has pages."""

    @classmethod
    def allocate(cls, rows: int, pages: int, *, device: torch.device | str) -> Self:
        """Allocate for B = ``rows``; every part is aligned, so kernels see one kind of address."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            slots=zeros(rows, dtype=torch.int64),
            token_ids=zeros(rows),
            positions=zeros(rows),
            kv_slots=zeros(rows, dtype=torch.int64),
            lengths=zeros(rows),
            # page 0 exists, whatever reads beyond a sequence
            block_table=zeros(rows, pages),
        )

    def first(self, rows: int) -> "BatchRows":
        """View the first rows."""
        return BatchRows(
            slots=self.slots[:rows],
            token_ids=self.token_ids[:rows],
            positions=self.positions[:rows],
            kv_slots=self.kv_slots[:rows],
            lengths=self.lengths[:rows],
            block_table=self.block_table[:rows],
        )


def write_words(state: SequenceState, offsets: torch.Tensor, values: torch.Tensor) -> None:
    """Change some words.

    Args:
        state: written in place.
        offsets: int32 ``[n]`` into ``state.words``, none twice.
        values: int32 ``[n]``.
    """
    if state.words.device.type == "cpu":
        state.words[offsets.long()] = values
        return
    launch_write(state, offsets, values)


def launch_write(state: SequenceState, offsets: torch.Tensor, values: torch.Tensor) -> None:
    """Run the Triton kernel, on a GPU or in the interpreter; see `write_words`."""
    count = offsets.shape[0]
    if count:
        _write_kernel[(triton.cdiv(count, WRITE_BLOCK),)](
            state.words, offsets, values, count, BLOCK=WRITE_BLOCK
        )


def advance_rows(state: SequenceState, batch: BatchRows, *, page_size: int) -> None:
    """Lay out the next token of every row of the batch and count it: one launch on a GPU.

    Args:
        state: its first B rows name the sequences, none but the scratch slot twice.
        batch: of B rows, written to.
        page_size: T.
    """
    if state.words.device.type == "cpu":
        advance_reference(state, batch, page_size=page_size)
    else:
        launch_advance(state, batch, page_size=page_size)


def launch_advance(state: SequenceState, batch: BatchRows, *, page_size: int) -> None:
    """Run the Triton kernel, on a GPU or in the interpreter; see `advance_rows`."""
    slots, pages = state.block_table.shape
    _advance_kernel[(batch.token_ids.shape[0],)](
        state.rows, state.lengths, state.last_tokens, state.block_table,
        batch.slots, batch.token_ids, batch.positions, batch.kv_slots, batch.lengths,
        batch.block_table,
        slots - 1, pages,
        PAGE=page_size,
        BLOCK_P=min(WRITE_BLOCK, triton.next_power_of_2(pages)),
    )  # fmt: skip


def advance_reference(state: SequenceState, batch: BatchRows, *, page_size: int) -> None:
    """Compute `advance_rows` in plain torch on any device."""
    slots, pages = state.block_table.shape
    rows = state.rows[: batch.token_ids.shape[0]].long()
    lengths = state.lengths[rows]
    table = state.block_table[rows]
    page = table.gather(1, (lengths // page_size).long().unsqueeze(1)).squeeze(1).long()
    batch.slots.copy_(rows)
    batch.token_ids.copy_(state.last_tokens[rows])
    batch.positions.copy_(lengths)
    batch.kv_slots.copy_(page * page_size + lengths % page_size)
    batch.lengths.copy_(lengths + 1)
    used = torch.arange(pages, device=rows.device) <= (lengths // page_size).unsqueeze(1)
    batch.block_table.copy_(torch.where(used, table, batch.block_table))
    state.lengths[rows] = torch.where(rows == slots - 1, 0, lengths + 1)


def record_tokens(
    state: SequenceState, slots: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor
) -> None:
    """Remember what was drawn, for the next step and for the host: one launch on a GPU.

    Args:
        state: written in place.
        slots: int64 ``[B]``, whose tokens these are.
        tokens: int32 ``[B]``, B <= S; -1 for a row that could not be drawn.
        drawn: int32 of at least B, written to.
    """
    if state.words.device.type == "cpu":
        record_reference(state, slots, tokens, drawn)
    else:
        launch_record(state, slots, tokens, drawn)


def launch_record(
    state: SequenceState, slots: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor
) -> None:
    """Run the Triton kernel, on a GPU or in the interpreter; see `record_tokens`."""
    count = tokens.shape[0]
    if count:
        # one size for all batches
        _record_kernel[(1,)](
            slots,
            tokens,
            state.last_tokens,
            drawn,
            count,
            BLOCK=triton.next_power_of_2(len(state.lengths)),
        )


def record_reference(
    state: SequenceState, slots: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor
) -> None:
    """Compute `record_tokens` in plain torch on any device."""
    count = tokens.shape[0]
    drawn[:count] = tokens
    state.last_tokens[slots] = tokens.clamp(min=0)


# numbers and places of words come as they like, and none is worth a compilation of its own
@triton.jit(
    do_not_specialize=["count"], do_not_specialize_on_alignment=["offsets_ptr", "values_ptr"]
)
def _write_kernel(words_ptr, offsets_ptr, values_ptr, count, BLOCK: tl.constexpr):
    """One program writes BLOCK words."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    offset = tl.load(offsets_ptr + offs, mask=mask, other=0)
    tl.store(words_ptr + offset, tl.load(values_ptr + offs, mask=mask), mask=mask)


@triton.jit
def _advance_kernel(
    rows_ptr, lengths_ptr, last_ptr, table_ptr,
    slots_ptr, token_ids_ptr, positions_ptr, kv_slots_ptr, out_lengths_ptr, out_table_ptr,
    scratch, pages,
    PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program lays out one row, BLOCK_P pages of its table at a time."""
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + b).to(tl.int64)
    length = tl.load(lengths_ptr + slot)
    pages_row = table_ptr + slot * pages
    last_page = length // PAGE
    page = tl.load(pages_row + last_page).to(tl.int64)
    tl.store(slots_ptr + b, slot)
    tl.store(token_ids_ptr + b, tl.load(last_ptr + slot))
    tl.store(positions_ptr + b, length)
    tl.store(kv_slots_ptr + b, page * PAGE + length % PAGE)
    tl.store(out_lengths_ptr + b, length + 1)
    for first in range(0, last_page + 1, BLOCK_P):
        offs = first + tl.arange(0, BLOCK_P)
        mask = offs <= last_page
        tl.store(out_table_ptr + b * pages + offs, tl.load(pages_row + offs, mask=mask), mask=mask)
    # several rows may be scratch, and none of them may move the others
    tl.store(lengths_ptr + slot, length + 1, mask=slot != scratch)


@triton.jit(do_not_specialize=["count"])
def _record_kernel(slots_ptr, tokens_ptr, last_ptr, drawn_ptr, count, BLOCK: tl.constexpr):
    """One program records all rows."""
    offs = tl.arange(0, BLOCK)
    mask = offs < count
    slot = tl.load(slots_ptr + offs, mask=mask, other=0)
    token = tl.load(tokens_ptr + offs, mask=mask, other=0)
    tl.store(drawn_ptr + offs, token, mask=mask)
    tl.store(last_ptr + slot, tl.maximum(token, 0), mask=mask)
