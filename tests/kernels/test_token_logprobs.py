import pytest
import torch

from kernels.scratch import Scratch
from kernels.token_logprobs import LIKELIEST, measure_logprobs_reference
from tests.kernels.small_ops import load_small_op


@pytest.fixture
def logprobs_op(monkeypatch):
    return load_small_op("token_logprobs", None, monkeypatch)


def measured(op, measure, logits, tokens, wanted, slots, **options):
    out = op.RowLogprobs.empty(len(logits) + 1, logits.device)
    out.chosen.fill_(77)
    measure(logits, tokens, wanted, slots, out, **options)
    return out


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [(torch.float32, 7), (torch.bfloat16, 300), (torch.float16, 4096), (torch.float32, 9001)],
)
def test_logprobs_and_the_likeliest_tokens_are_those_of_torch(
    logprobs_op, device, dtype, vocabulary
):
    logits = (torch.randn(3, vocabulary, device=device) * 3).to(dtype)
    logits[1, : vocabulary // 2] = -torch.inf
    case = (
        logits,
        torch.tensor([vocabulary - 1, vocabulary // 2, 0], dtype=torch.int32, device=device),
        torch.tensor([0, 1, 1, 1], dtype=torch.int32, device=device),
        torch.tensor([1, 3, 2], device=device),
    )
    scratch = Scratch.of_bytes(logprobs_op.logprob_scratch_bytes(3, vocabulary), logits.device)

    out = measured(logprobs_op, logprobs_op.measure_logprobs, *case, scratch=scratch)
    expected = measured(logprobs_op, measure_logprobs_reference, *case)

    assert torch.equal(out.top_ids, expected.top_ids)
    # a sum of up to 9001 terms in another order, and one exponential each
    assert torch.allclose(out.chosen, expected.chosen, rtol=0, atol=1e-5)
    assert torch.allclose(out.top, expected.top, rtol=0, atol=1e-5)
    assert out.chosen[3] == 77


def test_equals_come_in_the_order_of_their_ids(logprobs_op, device):
    logits = torch.zeros(1, 5000, device=device)
    logits[0, ::2] *= -1.0
    logits[0, [4999, 3]] = 2.0
    one = torch.ones(1, dtype=torch.int32, device=device)

    out = measured(logprobs_op, logprobs_op.measure_logprobs, logits, one, one, one.long() - 1)

    assert out.top_ids[0].tolist() == [3, 4999, 0, 1, 2, *range(4, 19)]


def test_only_rows_that_ask_are_measured(logprobs_op, device):
    logits = torch.randn(2, 50, device=device)
    tokens = torch.tensor([3, -1], dtype=torch.int32, device=device)
    slots = torch.tensor([1, 0], device=device)

    for measure in (logprobs_op.measure_logprobs, measure_logprobs_reference):
        wanted = torch.tensor([0, 1], dtype=torch.int32, device=device)
        out = measured(logprobs_op, measure, logits, tokens, wanted, slots)
        assert out.chosen[1] == 77
        assert out.top_ids[1].tolist() == [0] * LIKELIEST
        # a row from which nothing could be drawn has no likelihood
        wanted = torch.tensor([1, 0], dtype=torch.int32, device=device)
        assert measured(logprobs_op, measure, logits, tokens, wanted, slots).chosen[1].isnan()
