import pytest
import torch

from kernels.sampling_reference import philox_words, sample_tokens_reference
from kernels.scratch import Scratch
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


@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [(torch.float32, 37), (torch.float16, 100), (torch.bfloat16, 1100)]
)
def test_every_row_draws_what_torch_draws(sampling, device, dtype, vocabulary):
    rows = mixed_rows(sampling, device)
    logits = (torch.randn(8, vocabulary, device=device) * 3).to(dtype)
    out = torch.full((8,), -7, dtype=torch.int32, device=device)

    tokens = sampling.sample_tokens(logits, rows, sampling.Filters(**ALL), out=out)

    assert tokens is out
    assert tokens.tolist() == sample_tokens_reference(logits, rows).tolist()


@pytest.mark.parametrize(
    "launch",
    [{"splits": 1, "digit_bits": 5, "block": 512}, {"splits": 2, "digit_bits": 4, "block": 512}],
)
def test_the_launch_does_not_change_the_draw(sampling, device, launch):
    rows = rows_of(sampling, 2, device, top_k=[0, 30], top_p=[0.6, 0.9], seed=[1, 2])
    logits = (torch.randn(2, 1100, device=device) * 3).bfloat16()

    tokens = sampling.sample_tokens(
        logits, rows, sampling.Filters(**ALL), config=sampling.LaunchConfig(**launch)
    )

    assert tokens.tolist() == sample_tokens_reference(logits, rows).tolist()


def test_a_row_draws_the_same_alone_as_in_a_batch(sampling, device):
    rows = mixed_rows(sampling, device)
    logits = torch.randn(8, 60, device=device).bfloat16()
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


def test_both_zeros_are_one_logit_to_every_limit(sampling, device):
    logits = torch.full((3, 40), -3.0, device=device)
    logits[:, 1:20] = -0.0
    logits[:, 30] = 0.0
    rows = rows_of(sampling, 3, device, top_k=[1, 0, 5], top_p=[1.0, 0.5, 0.5], seed=range(3))

    tokens = sampling.sample_tokens(logits, rows, sampling.Filters(**ALL))

    assert tokens.tolist() == sample_tokens_reference(logits, rows).tolist()
    assert any(logits[i, token].signbit() for i, token in enumerate(tokens.tolist()))


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


def chi_square(tokens, p):
    counts = torch.bincount(tokens.long(), minlength=len(p))
    assert not counts[p == 0].any()
    expected = (p * len(tokens))[p > 0]
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


def test_the_kernel_draws_every_token_as_often_as_it_is_likely(sampling, device):
    p = torch.tensor([0.05, 0.35, 0.2, 0.1, 0.3])
    rows = rows_of(sampling, 80, device, position=range(80), seed=11)

    logits = p.log().expand(80, -1).contiguous().to(device)
    tokens = sampling.sample_tokens(logits, rows, sampling.Filters())

    # the seed is fixed; the 99.9 % point of four degrees of freedom
    assert chi_square(tokens.cpu(), p) < 18.5


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
    rows = rows_of(sampling, 20000, "cpu", position=range(20000), seed=11, **asked)

    # the kernel's draws are the reference's, as the tests above hold
    tokens = sample_tokens_reference(p.log().expand(20000, -1), rows)

    likeliest = p.topk(kept).indices
    left = torch.zeros(6)
    left[likeliest] = p[likeliest] ** (1 / asked.get("temperature", 1.0))
    # the 99.9 % point of five degrees of freedom
    assert chi_square(tokens, left / left.sum()) < 20.5


def test_random_words_are_those_of_the_published_generator():
    # the known answers of Philox 4x32-10 for a counter and key of zeros
    zero = torch.zeros(1, dtype=torch.int64)

    words = [int(each) for each in philox_words(zero, zero, zero)]

    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


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


def test_rows_draw_by_their_slots_and_their_positions_move_on(sampling, device):
    slots = torch.tensor([6, 2, 5], device=device)
    logits = (torch.randn(3, 1100, device=device) * 3).bfloat16()
    kept = mixed_rows(sampling, device)
    rows, twin = (mixed_rows(sampling, device) for _ in range(2))
    chosen = sampling.SamplingRows(
        **{name: getattr(kept, name)[slots] for name in sampling.SamplingRows.__slots__}
    )
    scratch = Scratch.of_bytes(sampling.scratch_bytes(8, 1100), logits.device)

    tokens = sampling.sample_tokens(
        logits, rows, sampling.Filters(**ALL), slots=slots, advance=True, scratch=scratch
    )
    by_torch = sample_tokens_reference(logits, twin, slots=slots, advance=True)

    assert tokens.tolist() == by_torch.tolist() == sample_tokens_reference(logits, chosen).tolist()
    assert rows.position.tolist() == [100, 101, 103, 103, 104, 106, 107, 107]
    assert twin.position.tolist() == rows.position.tolist()


def test_a_scratch_that_is_too_small_is_refused(sampling, device):
    rows = rows_of(sampling, 2, device, top_k=3)
    scratch = Scratch.of_bytes(sampling.scratch_bytes(1, 100) - 1, torch.device(device))

    with pytest.raises(ValueError, match="scratch of"):
        sampling.sample_tokens(
            torch.zeros(2, 100, device=device), rows, sampling.Filters(**ALL), scratch=scratch
        )
