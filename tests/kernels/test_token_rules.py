import pytest
import torch

from kernels import token_rules
from kernels.token_rules import IN_PROMPT, MAX_COUNT, apply_rules_reference, count_tokens_reference
from tests.kernels.small_ops import load_small_op


@pytest.fixture
def rules_op(monkeypatch):
    return load_small_op("token_rules", None, monkeypatch)


def rules_of(rules_op, device, slots=4, vocabulary=100):
    """Rules that change nothing, of up to 8 biases and 4 ends."""

    def full(value, *shape, dtype=torch.int32):
        return torch.full((slots, *shape), value, dtype=dtype, device=device)

    return rules_op.TokenRules(
        counts=full(0, vocabulary, dtype=torch.int16), is_penalized=full(0),
        repetition=full(1.0, dtype=torch.float32), presence=full(0.0, dtype=torch.float32),
        frequency=full(0.0, dtype=torch.float32), biases=full(0), bias_ids=full(0, 8),
        bias_values=full(0.0, 8, dtype=torch.float32), ends=full(0), end_ids=full(0, 4),
        ends_from=full(0, dtype=torch.int64), position=full(0, dtype=torch.int64),
        is_guided=full(0), masks=full(-1, -(-vocabulary // 32)),
    )  # fmt: skip


def rows(*slots, device):
    return torch.tensor(slots, device=device)


def give_every_rule(rules):
    """Slot 0 has none, 1 penalties, 2 biases and ends held back, 3 a guide and all the others."""
    vocabulary = rules.counts.shape[1]
    for slot in (1, 3):
        rules.is_penalized[slot] = 1
        rules.repetition[slot] = 1.3
        rules.presence[slot] = 0.7
        rules.frequency[slot] = 0.13
        drawn = torch.arange(vocabulary) % 5
        drawn[::7] += IN_PROMPT
        rules.counts[slot] = drawn.short()
    for slot in (2, 3):
        rules.biases[slot] = 3
        rules.bias_ids[slot, :3] = torch.tensor([0, 5, vocabulary - 1], dtype=torch.int32)
        rules.bias_values[slot, :3] = torch.tensor([-100.0, 2.5, 0.3])
        rules.ends[slot] = 2
        rules.end_ids[slot, :2] = torch.tensor([5, vocabulary // 2], dtype=torch.int32)
        rules.ends_from[slot] = 9
    rules.position.fill_(8)
    rules.is_guided[3] = 1
    rules.masks[3] = torch.randint(-(2**31), 2**31, rules.masks[3].shape, dtype=torch.int32)
    return rules


@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [(torch.float32, 37), (torch.bfloat16, 2048), (torch.float16, 4100)]
)
def test_every_rule_changes_logits_as_torch_does(rules_op, device, dtype, vocabulary):
    rules = give_every_rule(rules_of(rules_op, device, vocabulary=vocabulary))
    logits = (torch.randn(5, vocabulary, device=device) * 4).to(dtype)
    before = logits.clone()
    slots = rows(3, 0, 1, 2, 0, device=device)
    out = torch.full((5, vocabulary), 77.0, device=device)

    changed = rules_op.apply_rules(logits, rules, slots, out=out)

    assert changed is out
    assert torch.equal(changed, apply_rules_reference(logits, rules, slots))
    assert torch.equal(changed[1], logits[1].float())
    assert torch.equal(logits, before)


def test_rows_of_wider_tensors_are_read_and_written_in_place(rules_op, device):
    rules = give_every_rule(rules_of(rules_op, device))
    logits, out = torch.randn(2, 128, device=device), torch.full((2, 160), 77.0, device=device)
    slots = rows(3, 2, device=device)

    rules_op.apply_rules(logits[:, 5:105], rules, slots, out=out[:, :100])

    assert torch.equal(out[:, :100], apply_rules_reference(logits[:, 5:105], rules, slots))
    assert (out[:, 100:] == 77).all()


def test_penalties_are_those_of_openai_and_transformers():
    rules = rules_of(token_rules, "cpu", slots=1, vocabulary=5)
    rules.is_penalized[0] = 1
    rules.repetition[0], rules.presence[0], rules.frequency[0] = 2.0, 0.5, 0.25
    # not seen, in the prompt, drawn twice, both, drawn once
    rules.counts[0] = torch.tensor([0, IN_PROMPT, 2, IN_PROMPT + 2, 1], dtype=torch.int16)

    changed = apply_rules_reference(
        torch.tensor([[4.0, 4.0, 4.0, -4.0, -1.0]]), rules, torch.tensor([0])
    )

    # transformers divides or multiplies what was seen; OpenAI takes c alpha_frequency and, where
    # c > 0, alpha_presence
    assert changed.tolist() == [[4.0, 2.0, 2 - 0.5 - 0.5, -8 - 0.5 - 0.5, -2 - 0.25 - 0.5]]


def test_an_end_is_held_back_until_its_position(rules_op, device):
    rules = rules_of(rules_op, device)
    rules.ends[0] = 1
    rules.end_ids[0, 0] = 7
    rules.ends_from[0] = 3
    logits = torch.zeros(1, 100, device=device)

    rules.position[0] = 2
    early = rules_op.apply_rules(logits, rules, rows(0, device=device))
    rules.position[0] = 3
    late = rules_op.apply_rules(logits, rules, rows(0, device=device))

    assert early[0].isinf().nonzero().tolist() == [[7]]
    assert torch.equal(late, logits)


def test_drawn_tokens_are_counted_where_a_slot_is_penalized(rules_op, device):
    rules, expected = rules_of(rules_op, device), rules_of(rules_op, device)
    for each in (rules, expected):
        each.is_penalized[:3] = 1
        each.counts[0, 4] = IN_PROMPT
        each.counts[1, 4] = MAX_COUNT
    slots = rows(0, 1, 2, 3, device=device)
    tokens = torch.tensor([4, 4, -1, 4], dtype=torch.int32, device=device)

    rules_op.count_tokens(tokens, rules, slots)
    count_tokens_reference(tokens, expected, slots)

    assert torch.equal(rules.counts, expected.counts)
    # still in the prompt and once in the answer; full; nothing drawn; not penalized
    assert rules.counts[:, 4].tolist() == [IN_PROMPT + 1, MAX_COUNT, 0, 0]
    assert rules.counts.count_nonzero() == 2


def test_what_does_not_fit_the_rules_is_refused(rules_op):
    rules = rules_of(rules_op, "cpu")

    with pytest.raises(ValueError, match="strides"):
        rules_op.apply_rules(torch.zeros(100, 2).t(), rules, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="rules of 100 tokens for 90"):
        rules_op.apply_rules(torch.zeros(1, 90), rules, torch.tensor([0]))
    with pytest.raises(ValueError, match="slots"):
        rules_op.apply_rules(torch.zeros(2, 100), rules, torch.tensor([0]))
