"""What is sent to the device of a step, and what is not."""

import numpy as np
import pytest
import torch

from engine.inference.draft_check import DraftRows, last_accepted, likeliest_tokens
from engine.inference.mixed_batch import ON_DEVICE, MixedBatch
from engine.inference.step_buffers import HostArena, StepBuffers
from engine.inference.steps import SequenceStep, StepPlan
from kernels.step_state import SequenceState

CPU = torch.device("cpu")
SLOTS, PAGES, PAGE = 4, 6, 16


@pytest.fixture
def buffers():
    state = SequenceState.allocate(SLOTS, PAGES, scratch_page=50, device=CPU)
    return StepBuffers(state, PAGE)


def send(buffers):
    """Apply what was noted; returns how many words changed hands."""
    arena = HostArena(200, CPU)
    arena.begin()
    placed = buffers.pack(arena)
    buffers.apply(arena.send(), placed)
    return placed[0].stop - placed[0].start


def step_of(slot, start, token_ids=(), pages=(7, 8), **others):
    return SequenceStep(
        slot=slot, start=start, token_ids=token_ids, page_ids=pages, draws=True, **others
    )


def test_pieces_of_an_arena_are_aligned_and_in_order():
    arena = HostArena(20, CPU)
    arena.begin()

    places = [arena.add(values) for values in ([1, 2, 3], [], np.array([4, 5, 6, 7, 8]), [9])]

    assert [place.start for place in places] == [0, 4, 4, 12]
    sent = arena.send()
    assert [sent[place].tolist() for place in places] == [[1, 2, 3], [], [4, 5, 6, 7, 8], [9]]


def test_a_new_sequence_says_everything_and_the_next_step_nothing(buffers):
    buffers.forget(2)
    buffers.place(step_of(2, 20, (5,)), advances=True)
    assert send(buffers) == 4  # length, token, two pages

    assert buffers.state.lengths[2] == 20
    assert buffers.state.last_tokens[2] == 5
    assert buffers.state.block_table[2].tolist() == [7, 8, 50, 50, 50, 50]
    buffers.place(step_of(2, 21), advances=True)
    assert send(buffers) == 0


def test_pages_that_are_added_are_sent_alone_and_others_all(buffers):
    buffers.forget(0)
    buffers.place(step_of(0, 31), advances=True)
    send(buffers)

    buffers.place(step_of(0, 32, pages=(7, 8, 9)), advances=True)
    assert send(buffers) == 1
    buffers.place(step_of(0, 33, pages=(7, 4, 9)), advances=True)
    assert send(buffers) == 3
    assert buffers.state.block_table[0].tolist() == [7, 4, 9, 50, 50, 50]


def test_rows_are_sent_when_the_set_of_sequences_changes(buffers):
    buffers.choose_rows([1, 0], 3)
    assert send(buffers) == 3
    assert buffers.state.rows.tolist() == [1, 0, 3, 3]
    buffers.choose_rows([1, 0], 3)
    assert send(buffers) == 0
    buffers.choose_rows([1], 1)
    assert send(buffers) == 0
    buffers.choose_rows([1], 2)
    assert send(buffers) == 2
    assert buffers.state.rows.tolist() == [1, 3, 3, 3]
    buffers.choose_rows([0], 4)
    assert send(buffers) == 4
    assert buffers.state.rows.tolist() == [0, 3, 3, 3]


def test_a_length_is_sent_again_behind_drafts(buffers):
    buffers.forget(1)
    buffers.place(step_of(1, 9, (4, 5, 6), drafts=2), advances=False)
    send(buffers)
    assert buffers.state.lengths[1] == 12

    buffers.place(step_of(1, 11), advances=True)
    assert send(buffers) == 1
    assert buffers.state.lengths[1] == 11


def test_a_mixed_step_is_laid_out_token_by_token():
    steps = (
        step_of(3, 17, pages=(2, 5)),
        step_of(0, 4, (40,), pages=(9,)),
        step_of(1, 14, (41, 42, 43), pages=(6, 1)),
        step_of(2, 0, (44, 45), pages=(3,), drafts=1),
    )

    batch = MixedBatch.of(StepPlan(steps=steps), PAGE)

    # a guess is computed as the decode that would follow, with the tokens before it
    assert batch.token_ids.tolist() == [ON_DEVICE, 40, 44, 45, 41, 42, 43]
    assert batch.positions.tolist() == [17, 4, 0, 1, 14, 15, 16]
    assert batch.kv_slots.tolist() == [81, 148, 48, 49, 110, 111, 16]
    assert (batch.slots.tolist(), batch.lengths.tolist()) == ([3, 0, 2, 2, 1], [18, 5, 1, 2, 17])
    assert (batch.decodes, batch.cu_seqlens.tolist()) == (4, [0, 3])
    assert batch.logit_rows.tolist() == [0, 1, 6, 2, 3]
    assert [step.slot for step in batch.drawing] == [3, 0, 1]
    assert [step.slot for step in batch.drafting] == [2]


def test_a_step_that_draws_nothing_still_asks_for_a_row():
    chunk = SequenceStep(slot=0, start=0, token_ids=(1, 2), page_ids=(0,), draws=False)

    batch = MixedBatch.of(StepPlan(steps=(chunk,)), PAGE)

    assert batch.logit_rows.tolist() == [0]
    assert batch.drawing == ()


def test_drafts_of_unlike_length_lie_in_one_table():
    table = DraftRows.of([(5, 6, 7), (8,)])
    likeliest = torch.tensor([5, 6, 1, 2, 8, 3], dtype=torch.int32)

    last = last_accepted(
        likeliest, torch.from_numpy(table.rows).long(), torch.from_numpy(table.drafts)
    )

    # two of three are right, so the third is what was found there; one of one
    assert table.rows.tolist() == [[0, 1, 2, 3], [4, 5, 5, 5]]
    assert last.tolist() == [1, 3]


def test_the_likeliest_token_is_the_lowest_id_among_equals_and_none_where_a_logit_is_broken():
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[1, 3, 3], [nan, 1, 2], [1, inf, 2], [-inf, 1, 0], [-inf, -inf, -inf]])

    assert likeliest_tokens(logits).tolist() == [1, -1, -1, 1, -1]
