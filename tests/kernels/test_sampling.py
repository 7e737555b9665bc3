import pytest
import torch

from kernels.sampling_reference import sample_tokens_reference
from tests.kernels.small_ops import load_small_op

KERNELS = ("choose_kernel", "draw_kernel", "peak_kernel", "search_kernel")
ALL = {"top_k": True, "top_p": True, "min_p": True}


@pytest.fixture
def sampling(monkeypatch):
    return load_small_op("sampling", ("_sampling_kernels", KERNELS), monkeypatch)


def rows_of(sampling, m, device, **asked):
    kinds = {
        "temperature": (1.0, torch.float32), "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32), "min_p": (0.0, torch.float32),
        "seed": (0, torch.int64), "position": (0, torch.int32),
    }  # fmt: skip
    values = {
        name: torch.as_tensor(asked.get(name, default)).to(dtype).expand(m).contiguous().to(device)
        for name, (default, dtype) in kinds.items()
    }
    return sampling.SamplingRows(**values)


def mixed_rows(sampling, device):
    """Eight rows, each with other limits."""
    return rows_of(
        sampling, 8, device,
        temperature=[0.0, 1.0, 0.7, 1.5, 1.0, 0.9, 2.0, 0.5],
        top_k=[0, 0, 5, 0, 0, 20, 40, 1],
        top_p=[1.0, 1.0, 1.0, 0.6, 1.0, 0.8, 0.9, 0.5],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.02, 0.0],
        seed=[1, 2, -3, 2**40 + 4, 5, 6, 7, 8], position=range(100, 108),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [37, 1500])
def test_every_row_draws_what_torch_draws(sampling, device, dtype, vocabulary):
    rows = mixed_rows(sampling, device)
    logits = (torch.randn(8, vocabulary, device=device) * 3).to(dtype)
    out = torch.full((8,), -7, dtype=torch.int32, device=device)

    tokens = sampling.sample_tokens(logits, rows, sampling.Filters(**ALL), out=out)

    assert tokens is out
    assert tokens.tolist() == sample_tokens_reference(logits, rows).tolist()


@pytest.mark.parametrize(
    "launch",
    [
        {"splits": 1, "digit_bits": 5, "block": 1024},
        {"splits": 2, "digit_bits": 3, "block": 128},
        {"splits": 4, "digit_bits": 1, "block": 512},
    ],
)
def test_the_launch_does_not_change_the_draw(sampling, device, launch):
    rows = mixed_rows(sampling, device)
    logits = (torch.randn(8, 1500, device=device) * 3).bfloat16()

    tokens = sampling.sample_tokens(
        logits, rows, sampling.Filters(**ALL), config=sampling.LaunchConfig(**launch)
    )

    assert tokens.tolist() == sample_tokens_reference(logits, rows).tolist()


def test_a_row_draws_the_same_alone_as_in_a_batch(sampling, device):
    rows = mixed_rows(sampling, device)
    logits = torch.randn(8, 300, device=device)
    together = sampling.sample_tokens(logits, rows, sampling.Filters(**ALL))
    alone = sampling.SamplingRows(
        **{name: getattr(rows, name)[5:6] for name in sampling.SamplingRows.__slots__}
    )

    token = sampling.sample_tokens(logits[5:6], alone, sampling.Filters(**ALL))

    assert token.tolist() == together[5:6].tolist()


def test_greedy_takes_the_first_of_equals_and_ignores_all_limits(sampling, device):
    logits = torch.zeros(2, 50, device=device)
    logits[0, [30, 12, 44]] = 5.0
    rows = rows_of(sampling, 2, device, temperature=0.0, top_k=3, top_p=0.1, min_p=0.9)

    assert sampling.sample_tokens(logits, rows, sampling.Filters(**ALL)).tolist() == [12, 0]


def test_a_row_that_cannot_be_drawn_from_says_so_and_leaves_the_others(sampling, device):
    logits = torch.randn(5, 40, device=device)
    logits[0, 3] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = -float("inf")
    logits[3, 1:] = -float("inf")
    rows = rows_of(sampling, 5, device, seed=range(5))

    tokens = sampling.sample_tokens(logits, rows, sampling.Filters())

    assert tokens.tolist()[:4] == [-1, -1, -1, 0]
    assert tokens.tolist() == sample_tokens_reference(logits, rows).tolist()


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, 6),
        ({"top_k": 3}, 3),
        ({"top_p": 0.75}, 3),
        ({"min_p": 0.3}, 4),
        ({"top_k": 4, "top_p": 0.6, "temperature": 2.0}, 3),
    ],
)
def test_draws_follow_the_distribution_that_is_left(sampling, asked, kept):
    p = torch.tensor([0.05, 0.35, 0.2, 0.02, 0.25, 0.13])
    draws = 400
    rows = rows_of(sampling, draws, "cpu", position=range(draws), seed=11, **asked)
    logits = p.log().expand(draws, -1).contiguous()

    tokens = sampling.sample_tokens(logits, rows, sampling.Filters(**ALL))

    tempered = p ** (1 / asked.get("temperature", 1.0))
    left = torch.zeros(6).scatter(0, p.topk(kept).indices, tempered[p.topk(kept).indices])
    expected = left / left.sum() * draws
    counts = torch.bincount(tokens.long(), minlength=6)
    assert not counts[left == 0].any()
    drawn = left > 0
    chi = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    # the seed is fixed: the 99.9 % point of five degrees of freedom
    assert chi < 20.5
    assert tokens.tolist() == sample_tokens_reference(logits, rows).tolist()


def test_the_reference_draws_every_token_as_often_as_it_is_likely(sampling):
    logits = torch.randn(64).log_softmax(0)
    draws = 20000
    rows = rows_of(sampling, draws, "cpu", position=range(draws), seed=3)

    tokens = sample_tokens_reference(logits.expand(draws, -1), rows)

    counts = torch.bincount(tokens.long(), minlength=64)
    chi = ((counts - draws * logits.exp()) ** 2 / (draws * logits.exp())).sum()
    # the 99.9 % point of 63 degrees of freedom
    assert chi < 104


def test_the_launch_is_chosen_by_rows_and_vocabulary(sampling):
    tuned = sampling.LaunchConfig(splits=16)

    assert sampling.select_config(1, 128256).splits == 128
    assert sampling.select_config(64, 128256).splits == 8
    assert sampling.select_config(1, 32000).splits == 32
    assert sampling.select_config(1, 100).splits == 1
    assert sampling.select_config(1, 100, {(1, 100): tuned}) is tuned


def test_what_does_not_fit_is_refused_by_name(sampling):
    rows = rows_of(sampling, 2, "cpu")

    with pytest.raises(ValueError, match="strides"):
        sampling.sample_tokens(torch.zeros(8, 2).t(), rows, sampling.Filters())
    with pytest.raises(ValueError, match="int64"):
        sampling.sample_tokens(torch.zeros(2, 8).long(), rows, sampling.Filters())
    with pytest.raises(ValueError, match="temperature"):
        sampling.sample_tokens(torch.zeros(3, 8), rows, sampling.Filters())
