import threading

import pytest
import torch

from engine.errors import ContextLengthExceeded, EngineError, NoTokenDrawn
from engine.inference.answer import Answer
from engine.inference.engine import EngineOptions, open_engine
from engine.inference.kv_cache import make_cache
from engine.inference.request import FinishReason, GenerationRequest, RequestInvalid
from engine.inference.sampling_params import Guide, GuideKind
from engine.spec import QuantSpec
from tests.tiny_models import FAMILIES
from tests.unit.engine.quantized_models import save_checkpoint

PROMPT = tuple(range(40, 52))


@pytest.fixture(scope="module")
def twin_and_engine(tmp_path_factory):
    twin, directory, _ = save_checkpoint(tmp_path_factory.mktemp("w8a16"), "w8a16")
    engine = open_engine(directory, "cpu")
    yield twin, engine
    engine.close()


@pytest.fixture
def engine(twin_and_engine):
    return twin_and_engine[1]


def request_of(**fields):
    return GenerationRequest(**{"prompt_ids": PROMPT, "max_tokens": 12, "temperature": 0, **fields})


def text_of(chunks):
    return "".join(each.text for each in chunks)


def test_greedy_text_is_that_of_the_model_without_a_cache(twin_and_engine):
    twin, engine = twin_and_engine
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(twin(torch.tensor([ids])).logits[0, -1].argmax()))

    chunks = list(engine.generate(request_of(ignore_eos=True)))

    assert text_of(chunks) == engine.text.decode(ids[len(PROMPT) :])
    assert [each.completion_tokens for each in chunks] == list(range(1, 13))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_bits", [8, 16])
def test_every_family_generates_as_it_does_without_a_cache(tmp_path, family, kv_bits):
    spec = QuantSpec(w_bits=8, a_bits=16, kv_bits=kv_bits)
    twin, directory, _ = save_checkpoint(tmp_path, spec, family)
    engine = open_engine(directory, "cpu")
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(4):
            cache = make_cache(2, kv_bits)
            logits = twin(torch.tensor([ids]), past_key_values=cache).logits
            ids.append(int(logits[0, -1].argmax()))

    chunks = list(engine.generate(request_of(max_tokens=4, ignore_eos=True)))

    assert text_of(chunks) == engine.text.decode(ids[len(PROMPT) :])


def test_only_the_last_chunk_has_a_finish_reason(engine):
    chunks = list(engine.generate(request_of(ignore_eos=True)))

    assert [each.finish_reason for each in chunks] == [None] * 11 + [FinishReason.LENGTH]


def test_a_seed_repeats_a_sampled_text(engine):
    def sampled(seed):
        return text_of(engine.generate(request_of(temperature=1.5, seed=seed, max_tokens=30)))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_stop_string_ends_the_text_before_it(engine):
    whole = text_of(engine.generate(request_of(ignore_eos=True)))
    stop = whole[4:6]

    chunks = list(engine.generate(request_of(ignore_eos=True, stop=(stop,))))

    assert text_of(chunks) == whole[: whole.find(stop)]
    assert chunks[-1].finish_reason is FinishReason.STOP


def test_a_long_prompt_enters_in_parts(engine, tmp_path):
    expected = text_of(engine.generate(request_of(prompt_ids=PROMPT * 8)))
    options = EngineOptions(max_sequences=2, max_step_tokens=10)
    stepwise = open_engine(save_checkpoint(tmp_path, "w8a16")[1], "cpu", options)

    assert text_of(stepwise.generate(request_of(prompt_ids=PROMPT * 8))) == expected
    assert stepwise.statistics().steps > 10
    stepwise.close()


def test_without_a_limit_the_context_is_filled(engine):
    chunks = list(engine.generate(request_of(max_tokens=None, ignore_eos=True)))

    assert len(PROMPT) + chunks[-1].completion_tokens == engine.context_length == 256
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_a_request_that_fits_exactly_is_answered(engine):
    chunks = list(engine.generate(request_of(prompt_ids=(65,) * 255, max_tokens=1)))

    assert chunks[-1].completion_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [((65,) * 256, None, "prompt"), ((65,) * 300, 1, "prompt"), (PROMPT, 245, "max_tokens")],
)
def test_what_does_not_fit_the_context_is_refused_before_anything_runs(
    engine, prompt, max_tokens, field
):
    with pytest.raises(ContextLengthExceeded, match="context of 256") as caught:
        engine.generate(request_of(prompt_ids=prompt, max_tokens=max_tokens))
    assert caught.value.field == field


@pytest.mark.parametrize("token_id", [-1, 260, 10**9])
def test_an_id_beyond_the_vocabulary_is_refused(engine, token_id):
    with pytest.raises(RequestInvalid, match="below 260"):
        engine.generate(request_of(prompt_ids=(1, token_id)))


def test_a_cancelled_generation_ends_within_two_steps(engine):
    # asked once in every step, which may be planned before the one ahead is received
    asked = iter([False] * 4 + [True] * 100)

    seen = list(engine.generate(request_of(ignore_eos=True), lambda: next(asked)))

    assert seen[-1].finish_reason is FinishReason.CANCELLED
    assert 2 <= seen[-1].completion_tokens <= 4


def test_a_request_cancelled_while_it_waits_generates_nothing(engine):
    (chunk,) = engine.generate(request_of(), lambda: True)

    assert (chunk.completion_tokens, chunk.finish_reason) == (0, FinishReason.CANCELLED)


def test_a_caller_that_walks_away_holds_nobody_up(engine):
    abandoned = engine.generate(request_of(ignore_eos=True))
    next(abandoned)

    assert len(list(engine.generate(request_of(ignore_eos=True)))) == 12
    abandoned.close()


def test_concurrent_requests_get_the_texts_they_get_alone(engine):
    prompts = [PROMPT, PROMPT[::-1], PROMPT[3:], PROMPT * 3]
    alone = [text_of(engine.generate(request_of(prompt_ids=each))) for each in prompts]
    together = [None] * len(prompts)

    def answer(index):
        together[index] = text_of(engine.generate(request_of(prompt_ids=prompts[index])))

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert together == alone


def test_a_quantized_cache_generates_too(tmp_path):
    engine = open_engine(save_checkpoint(tmp_path, "w4a8kv8")[1], "cpu")

    assert len(list(engine.generate(request_of(ignore_eos=True)))) == 12
    engine.close()


def test_a_closed_engine_ends_running_generations_and_takes_no_new_ones(tmp_path):
    engine = open_engine(save_checkpoint(tmp_path, "w4a8")[1], "cpu")
    running = engine.generate(request_of(ignore_eos=True, max_tokens=200))
    next(running)

    engine.close()

    with pytest.raises(EngineError, match="unloaded"):
        for _ in running:
            pass
    with pytest.raises(EngineError, match="unloaded"):
        engine.generate(request_of())


def answer_of(engine, ids, **fields):
    answer = Answer(request_of(**fields), fields.get("max_tokens", 100), engine.text)
    return [answer.accept(each) for each in ids]


def test_an_end_token_ends_the_answer_without_text(engine):
    (end,) = engine.text.eos_ids

    chunks = answer_of(engine, [*engine.text.encode("hi"), end])

    assert text_of(chunks) == "hi"
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].completion_tokens == 3


def test_a_stop_token_ends_the_answer_without_text(engine):
    chunks = answer_of(engine, engine.text.encode("hix"), stop_token_ids=engine.text.encode("x"))

    assert text_of(chunks) == "hi"
    assert chunks[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(("ignore_eos", "ends"), [(False, (3, 7)), (True, (3,))])
def test_end_tokens_held_back_are_those_that_would_end_the_answer(ignore_eos, ends):
    request = request_of(stop_token_ids=(3,), min_tokens=2, ignore_eos=ignore_eos)

    assert request.sampling(5, frozenset({7})).eos_ids == ends


def test_an_ignored_end_token_does_not_end_the_answer(engine):
    (end,) = engine.text.eos_ids

    chunks = answer_of(engine, [end, *engine.text.encode("hi")], ignore_eos=True)

    assert text_of(chunks) == "hi"
    assert chunks[-1].finish_reason is None


def test_an_answer_fails_where_no_token_could_be_drawn(engine):
    with pytest.raises(NoTokenDrawn, match="not finite"):
        answer_of(engine, [*engine.text.encode("hi"), -1])


def test_text_held_for_a_stop_string_comes_out_at_the_end(engine):
    chunks = answer_of(engine, engine.text.encode("abE"), stop=("END",), max_tokens=3)

    assert [each.text for each in chunks] == ["a", "b", "E"]
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_a_stop_string_completed_by_the_last_token_is_a_stop(engine):
    chunks = answer_of(engine, engine.text.encode("aEND"), stop=("END",), max_tokens=4)

    assert text_of(chunks) == "a"
    assert chunks[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_ids": ()}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 17}, "stop"),
        ({"stop": ("x" * 257,)}, "stop"),
        ({"stop_token_ids": (1,) * 33}, "stop_token_ids"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n"),
        ({"draft_tokens": 17}, "draft_tokens"),
        ({"guide": Guide(kind=GuideKind.JSON_OBJECT), "ignore_eos": True}, "ignore_eos"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"tenant": "x" * 257}, "tenant"),
    ],
)
def test_an_impossible_field_is_named(fields, field):
    with pytest.raises(RequestInvalid) as caught:
        request_of(**fields)
    assert caught.value.field == field
