import pytest
import torch

from engine.inference import draws
from engine.inference.sampler_state import SamplerState
from engine.inference.sampling_params import Guide, GuideKind, SamplingParams
from tests.kernels.small_ops import load_small_op

VOCABULARY = 90
PROMPT = (5, 6, 7, 5)


def params_of(**fields):
    return SamplingParams(**{"seed": 11, **fields})


EVERY_KIND = (
    params_of(temperature=0.0),
    params_of(seed=-3, top_k=9, top_p=0.8),
    params_of(temperature=1.7, min_p=0.05, repetition_penalty=1.4, frequency_penalty=0.6),
    params_of(presence_penalty=1.1, logit_bias=((3, 4.0), (89, -100.0), (40, 2.5)), logprobs=5),
    params_of(temperature=0.7, min_tokens=4, eos_ids=(0, 40), logprobs=0),
)


def logits_of(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCABULARY, generator=generator) * 2


def slots_of(*slots):
    return torch.tensor(slots)


def state_of(*params, drawn_ids=(), **options):
    state = SamplerState(len(params), VOCABULARY, "cpu", **options)
    for slot, each in enumerate(params):
        state.open(slot, each, PROMPT, drawn_ids)
    return state


def draw_many(state, slots, steps, first=0, **options):
    """Tokens by step, on logits that are the same for equal rows and steps."""
    rows = torch.tensor(slots)
    return [
        state.draw(logits_of(9, step)[rows], rows, **{"full": True, **options}).tolist()
        for step in range(first, first + steps)
    ]


def test_a_sequence_draws_the_same_alone_as_among_others():
    together = draw_many(state_of(*EVERY_KIND), [4, 1, 0, 3, 2], 6)

    for slot in range(5):
        alone = draw_many(state_of(*EVERY_KIND), [slot], 6)
        assert [row[[4, 1, 0, 3, 2].index(slot)] for row in together] == [row[0] for row in alone]


def test_plain_sequences_draw_the_same_in_every_kind_of_draw():
    whole = draw_many(state_of(*EVERY_KIND), [0, 1], 5)

    assert draw_many(state_of(*EVERY_KIND), [0, 1], 5, full=False) == whole
    unlimited = draw_many(state_of(*EVERY_KIND), [0], 5, full=False, limited=False)
    assert unlimited == [row[:1] for row in whole]


def test_a_preempted_sequence_goes_on_as_if_nothing_had_been():
    whole = draw_many(state_of(*EVERY_KIND), [0, 1, 2, 3, 4], 6)
    again = SamplerState(5, VOCABULARY, "cpu")
    for slot, params in enumerate(EVERY_KIND):
        again.open(slot, params, PROMPT, [row[slot] for row in whole[:3]])

    assert draw_many(again, [0, 1, 2, 3, 4], 3, first=3) == whole[3:]


def test_seeds_and_positions_make_the_difference():
    state = state_of(params_of(seed=1), params_of(seed=2), params_of(seed=1))
    same = torch.zeros(3, VOCABULARY)

    drawn = [state.draw(same, slots_of(0, 1, 2), full=False).tolist() for _ in range(6)]

    first, second, third = zip(*drawn, strict=True)
    assert first == third != second
    assert len(set(first)) > 3


def test_a_draw_that_does_not_advance_can_be_repeated():
    state = state_of(EVERY_KIND[2])

    once, twice = (draw_many(state, [0], 1, advance=False) for _ in range(2))

    assert once == twice == draw_many(state, [0], 1)


def test_a_frequency_penalty_lets_tokens_take_turns():
    state = state_of(params_of(temperature=0.0, frequency_penalty=1.0))
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, [20, 21, 22]] = torch.tensor([3.0, 2.5, 2.0])

    drawn = [int(state.draw(logits, slots_of(0), full=True)) for _ in range(6)]

    assert drawn == [20, 21, 20, 22, 21, 20]


def test_a_bias_can_force_and_forbid_a_token():
    state = state_of(
        params_of(temperature=0.0, logit_bias=((50, 100.0),)),
        params_of(temperature=0.0, logit_bias=((8, -100.0),)),
    )
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 8], logits[:, 9] = 20.0, 10.0

    assert state.draw(logits, slots_of(0, 1), full=True).tolist() == [50, 9]


def test_end_tokens_wait_for_the_least_number_of_tokens():
    state = state_of(params_of(temperature=0.0, min_tokens=3, eos_ids=(8, 9)))
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [8, 9, 10]] = torch.tensor([5.0, 4.0, 3.0])

    drawn = [int(state.draw(logits, slots_of(0), full=True)) for _ in range(4)]

    assert drawn == [10, 10, 10, 8]


def test_logprobs_are_of_the_logits_as_the_model_gave_them():
    state = state_of(
        params_of(temperature=0.0, logit_bias=((3, 100.0),), logprobs=2), params_of(seed=4)
    )
    logits = logits_of(2)
    state.logprobs.chosen.fill_(77)

    state.draw(logits, slots_of(0, 1), full=True)

    expected = logits[0].log_softmax(0)
    top = expected.topk(20)
    assert torch.allclose(state.logprobs.chosen[0], expected[3])
    assert torch.allclose(state.logprobs.top[0], top.values)
    assert state.logprobs.top_ids[0].tolist() == top.indices.tolist()
    assert state.logprobs.chosen[1] == 77


def test_a_slot_forgets_who_had_it_before():
    full = params_of(
        presence_penalty=2.0, logit_bias=((3, 50.0),), min_tokens=9, eos_ids=(1,), logprobs=3
    )
    state = state_of(full, full)
    draw_many(state, [0, 1], 3)
    for slot in (0, 1):
        state.close(slot)
        state.open(slot, EVERY_KIND[2 * slot], PROMPT)

    assert draw_many(state, [0, 1], 4) == draw_many(
        state_of(EVERY_KIND[0], EVERY_KIND[2]), [0, 1], 4
    )


def test_a_row_that_cannot_be_drawn_from_harms_no_other():
    logits = logits_of(2)
    logits[0, 4] = torch.nan
    state, twin = (state_of(EVERY_KIND[2], EVERY_KIND[2]) for _ in range(2))

    tokens = state.draw(logits, slots_of(0, 1), full=True).tolist()

    assert tokens[0] == -1
    assert tokens[1] == twin.draw(logits_of(2), slots_of(0, 1), full=True).tolist()[1]


def test_rows_that_fill_a_batch_up_may_share_a_slot():
    padded = state_of(EVERY_KIND[1], rows=3)
    pad = padded.pad_slot
    logits = logits_of(1).repeat(3, 1)

    tokens = padded.draw(logits, slots_of(0, pad, pad), full=True).tolist()

    assert tokens[0] == int(state_of(EVERY_KIND[1]).draw(logits[:1], slots_of(0), full=True))
    assert tokens[1] == tokens[2] == int(logits[0].argmax())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"logit_bias": ((VOCABULARY, 1.0),)}, "logit_bias"),
        ({"eos_ids": (-1,)}, "eos_ids"),
    ],
)
def test_a_token_beyond_the_vocabulary_is_refused_by_name(fields, field):
    with pytest.raises(ValueError, match=f"{field}.*vocabulary of {VOCABULARY}"):
        state_of(params_of(**fields))


def test_a_guide_without_a_compiler_is_refused():
    with pytest.raises(ValueError, match="without guides"):
        state_of(params_of(guide=Guide(kind=GuideKind.JSON_OBJECT)))


@pytest.fixture
def interpreted(monkeypatch):
    """Let `KernelDraws` launch kernels that run here."""
    files = {
        "sampling": ("sample_tokens",),
        "token_rules": ("apply_rules", "count_tokens"),
        "token_logprobs": ("measure_logprobs",),
    }
    kernels = ("choose_kernel", "draw_kernel", "peak_kernel", "search_kernel")
    for file, names in files.items():
        of_file = ("_sampling_kernels", kernels) if file == "sampling" else None
        copy = load_small_op(file, of_file, monkeypatch)
        for name in names:
            monkeypatch.setattr(draws, name, getattr(copy, name))
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_kernels_draw_count_and_measure_as_torch_does(interpreted):
    device = interpreted
    by_torch = SamplerState(5, VOCABULARY, device, launches=False)
    by_kernels = SamplerState(5, VOCABULARY, device, launches=True)
    for slot, params in enumerate(EVERY_KIND):
        by_kernels.open(slot, params, PROMPT)
        by_torch.open(slot, params, PROMPT)
    slots = torch.tensor([3, 0, 4, 2, 1], device=device)

    for step in range(2):
        logits = logits_of(5, step).bfloat16().to(device)
        expected = by_torch.draw(logits, slots, full=True)
        found = by_kernels.draw(logits, slots, full=True)
        assert found.tolist() == expected.tolist()
        for name in ("chosen", "top", "top_ids"):
            pair = getattr(by_kernels.logprobs, name), getattr(by_torch.logprobs, name)
            torch.testing.assert_close(*pair, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("full", [False, True])
def test_a_captured_draw_is_replayed_with_positions_and_counts(full):
    kinds = EVERY_KIND if full else (*EVERY_KIND[:2], params_of(seed=9, min_p=0.1))
    eager, replayed = (SamplerState(len(kinds), VOCABULARY, "cuda") for _ in range(2))
    logits = logits_of(len(kinds)).cuda()
    slots = torch.arange(len(kinds), device="cuda")
    eager.draw(logits, slots, full=full)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = replayed.draw(logits, slots, full=full)
    for state in (eager, replayed):
        for slot, params in enumerate(kinds):
            state.open(slot, params, PROMPT)

    for step in range(4):
        logits.copy_(logits_of(len(kinds), step))
        graph.replay()
        assert tokens.tolist() == eager.draw(logits, slots, full=full).tolist()
