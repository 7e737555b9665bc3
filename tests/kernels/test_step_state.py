"""What a device remembers of sequences: kernels equal references, and both the page's formulas."""

import pytest
import torch

from kernels import step_state
from kernels.step_state import BatchRows, SequenceState
from tests.kernels.conftest import load_kernel_module

PAGE, PAGES, SLOTS, SCRATCH_PAGE = 16, 5, 7, 99
LENGTHS = [0, 1, 15, 16, 47, 79, 0]


@pytest.fixture
def kernel(monkeypatch, device):
    """`kernels.step_state` whose Triton kernels run here."""
    return load_kernel_module("step_state", interpreted=device == "cpu", monkeypatch=monkeypatch)


@pytest.fixture
def state(device):
    return filled_state(device)


def filled_state(device, pages=PAGES, lengths=LENGTHS):
    made = SequenceState.allocate(SLOTS, pages, scratch_page=SCRATCH_PAGE, device=device)
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(SLOTS * pages, generator=generator).int().view(SLOTS, pages)
    made.block_table[:-1] = table[:-1].to(device)
    made.lengths.copy_(torch.tensor(lengths))
    made.last_tokens.copy_(torch.arange(SLOTS) + 1000)
    return made


def poisoned_rows(count, device, pages=PAGES):
    batch = BatchRows.allocate(count, pages, device=device)
    for name in BatchRows.__slots__:
        getattr(batch, name).fill_(-77)
    return batch


def copy_of(state):
    made = SequenceState.allocate(
        SLOTS, state.block_table.shape[1], scratch_page=0, device=state.words.device
    )
    made.words.copy_(state.words)
    return made


def test_everything_lies_in_one_vector(state):
    state.words.zero_()

    for name in ("lengths", "last_tokens", "rows", "block_table"):
        assert not getattr(state, name).any()


def test_a_fresh_state_is_scratch_alone():
    state = SequenceState.allocate(3, 2, scratch_page=8, device="cpu")

    assert state.words.tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 2, *[8] * 6]


@pytest.mark.parametrize("chosen", [[3], [5, 0, 2], [1, 2, 3, 4, 5, 6, 6], [6, 6, 6]])
def test_rows_advance_as_the_formula_says(state, chosen):
    state.rows[: len(chosen)] = torch.tensor(chosen)
    batch = poisoned_rows(len(chosen), state.words.device)
    table = state.block_table.tolist()

    step_state.advance_rows(state, batch, page_size=PAGE)

    for b, slot in enumerate(chosen):
        length, page = LENGTHS[slot], LENGTHS[slot] // PAGE
        assert batch.slots[b] == slot
        assert batch.token_ids[b] == 1000 + slot
        assert batch.positions[b] == length
        assert batch.lengths[b] == length + 1
        assert batch.kv_slots[b] == table[slot][page] * PAGE + length % PAGE
        assert batch.block_table[b].tolist()[: page + 1] == table[slot][: page + 1]
        assert state.lengths[slot] == (0 if slot == SLOTS - 1 else length + 1)
    others = set(range(SLOTS)) - set(chosen)
    assert all(state.lengths[slot] == LENGTHS[slot] for slot in others)
    assert state.block_table.tolist() == table


@pytest.mark.parametrize(
    ("pages", "lengths"), [(PAGES, LENGTHS), (1100, [17599, 16 * 1024, 16 * 1024 - 1, 5, 1, 0, 0])]
)
def test_the_kernel_advances_as_the_reference_does(kernel, device, pages, lengths):
    state = filled_state(device, pages, lengths)
    state.rows.copy_(torch.tensor([4, 1, 6, 0, 2, 6, 3]))
    twin = copy_of(state)
    batch, expected = (poisoned_rows(SLOTS, device, pages) for _ in range(2))

    kernel.launch_advance(state, batch, page_size=PAGE)
    step_state.advance_reference(twin, expected, page_size=PAGE)

    assert torch.equal(state.words, twin.words)
    for name in BatchRows.__slots__:
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def test_pages_of_a_long_table_do_not_overflow(kernel, device):
    """A slot of the cache is more than 31 bits hold."""
    state = filled_state(device)
    state.block_table.fill_(2**31 - 1)
    batch = poisoned_rows(1, device)
    state.rows[0] = 5

    kernel.launch_advance(state, batch, page_size=PAGE)

    assert batch.kv_slots.tolist() == [(2**31 - 1) * PAGE + 15]


@pytest.mark.parametrize("count", [0, 1, 30, 1500])
def test_words_are_written_where_they_belong(kernel, device, count):
    state = filled_state(device, pages=300)
    offsets = torch.randperm(len(state.words))[:count].int().to(device)
    values = torch.randint(0, 10**6, (count,), dtype=torch.int32).to(device)
    twin = copy_of(state)

    kernel.launch_write(state, offsets, values)
    step_state.write_words(twin, offsets, values)

    expected = filled_state(device, pages=300).words
    for offset, value in zip(offsets.tolist(), values.tolist(), strict=True):
        expected[offset] = value
    assert torch.equal(state.words, expected)
    assert torch.equal(twin.words, expected)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_tokens_are_recorded_for_the_host_and_for_the_next_step(kernel, state, count):
    device = state.words.device
    slots = torch.tensor([3, 0, 5, 6, 6], device=device)[:count]
    tokens = torch.tensor([7, -1, 128255, 4, 4], dtype=torch.int32, device=device)[:count]
    drawn, twin_drawn = (torch.full((9,), -77, dtype=torch.int32, device=device) for _ in range(2))
    twin = copy_of(state)

    kernel.launch_record(state, slots, tokens, drawn)
    step_state.record_reference(twin, slots, tokens, twin_drawn)

    assert drawn.tolist() == [*tokens.tolist(), *[-77] * (9 - count)]
    # a token that could not be drawn lies outside the embedding
    given = dict(zip(slots.tolist(), [7, 0, 128255, 4, 4], strict=False))
    assert state.last_tokens.tolist() == [given.get(s, 1000 + s) for s in range(SLOTS)]
    assert torch.equal(state.words, twin.words)
    assert torch.equal(drawn, twin_drawn)
