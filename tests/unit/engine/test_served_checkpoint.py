"""Engine, scheduler, runner, sampler and decoder together, on a tiny checkpoint and a CPU."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.checkpoint.reader import load_checkpoint
from engine.inference.batching import BatchingEngine
from engine.inference.decoder import Decoder
from engine.inference.engine import EngineOptions, kv_bytes_at_most
from engine.inference.guides import GuideCompiler
from engine.inference.limits import SchedulerLimits
from engine.inference.request import GenerationRequest
from engine.inference.runner_options import RunnerOptions
from engine.inference.runner_start import start_runner
from engine.inference.sampler_state import SamplerState
from engine.inference.sampling_params import Guide, GuideKind
from engine.inference.sequential import open_reference
from engine.inference.text import TextCodec
from tests.unit.engine.quantized_models import save_checkpoint

SEQUENCES = 4
DIGITS = Guide(kind=GuideKind.REGEX, text="[0-9]{3,9}")
REQUESTS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "draft_tokens": 4},
    {"seed": 3},
    {"seed": 4, "top_p": 0.7, "top_k": 20, "n": 2},
    {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 2},
    {"seed": 6, "logit_bias": ((65, 6.0),), "min_tokens": 12},
    {"seed": 7, "guide": DIGITS, "ignore_eos": False},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("served"), "w4a8kv8")[1]


@pytest.fixture
def serve(directory):
    """Start an engine; keywords are the runner's options."""
    engines = []

    def start(*, head_bits=8, step_tokens=32, **options):
        decoder = Decoder.from_loaded(load_checkpoint(directory, prepares=False), head_bits)
        codec = TextCodec.from_directory(directory)
        guides = GuideCompiler(codec)
        sampler = SamplerState(SEQUENCES, decoder.vocabulary, decoder.device, guides=guides)
        sizes = {
            "max_sequences": SEQUENCES,
            "kv_bits": 8,
            "pages": 64,
            "max_step_tokens": step_tokens,
        }
        runner = start_runner(decoder, sampler, RunnerOptions(**(sizes | options)))
        limits = SchedulerLimits(max_step_tokens=step_tokens)
        engines.append(BatchingEngine(runner, codec, limits=limits, check_guide=guides.check))
        return engines[-1]

    yield start
    for each in engines:
        each.close()


def request_of(number, fields):
    prompt = tuple(97 + (number * 7 + i * (i + number)) % 20 for i in range(9 + 8 * number))
    return GenerationRequest(
        **({"prompt_ids": prompt, "max_tokens": 16, "ignore_eos": True} | fields)
    )


def answer(engine, request):
    tokens = {index: [] for index in range(request.n)}
    for chunk in engine.generate(request):
        tokens[chunk.index].append((chunk.text, chunk.token_id))
        if request.logprobs is not None:
            assert chunk.logprobs.token_id == chunk.token_id
            assert len(chunk.logprobs.top) == request.logprobs
    return tokens


@pytest.mark.parametrize("options", [{}, {"buckets": (2, 4)}, {"chunk_buckets": (8, 16, 32)}])
def test_answers_are_the_same_alone_and_among_others(serve, options):
    engine = serve(**options)
    requests = [request_of(number, fields) for number, fields in enumerate(REQUESTS)]
    alone = [answer(engine, request) for request in requests]

    with ThreadPoolExecutor(len(requests)) as callers:
        together = list(callers.map(lambda request: answer(engine, request), requests))

    assert together == alone
    guided = "".join(text for text, _ in alone[-1][0])
    assert re.fullmatch(DIGITS.text, guided)
    statistics = engine.statistics()
    assert (statistics.running, statistics.kv_usage, statistics.faults) == (0, 0.0, 0)


def test_guesses_change_no_greedy_answer(serve):
    engine = serve()
    plain = request_of(2, {"temperature": 0.0, "max_tokens": 60, "draft_tokens": 0})
    guessing = request_of(2, {"temperature": 0.0, "max_tokens": 60, "draft_tokens": 5})

    assert answer(engine, guessing) == answer(engine, plain)
    assert engine.statistics().drafts_proposed > 0


def test_prompts_are_scored_as_by_the_reference_beside_answers_that_stay_the_same(serve, directory):
    # pages for 256 tokens: those that score and those that answer displace each other
    engine = serve(head_bits=None, step_tokens=256, pages=16)
    prompts = [tuple(range(97, 97 + 2)), request_of(4, {}).prompt_ids, text_of(140), text_of(250)]
    requests = [request_of(number, {"seed": number, "max_tokens": 40}) for number in range(3)]
    alone = [answer(engine, request) for request in requests]

    with ThreadPoolExecutor(8) as callers:
        found = callers.map(lambda prompt: engine.score_prompt(prompt, 3, lambda: False), prompts)
        together = callers.map(lambda request: answer(engine, request), requests)

    reference = open_reference(directory)
    for prompt, scores in zip(prompts, found, strict=True):
        check_scores(scores, reference.score_prompt(prompt, 3, lambda: False))
    assert list(together) == alone
    statistics = engine.statistics()
    assert (statistics.running, statistics.kv_usage, statistics.faults) == (0, 0.0, 0)


def text_of(length):
    return tuple(97 + i * i % 23 for i in range(length))


def check_scores(scores, expected):
    assert scores[0] is expected[0] is None
    for score, truth in zip(scores[1:], expected[1:], strict=True):
        assert score.token_id == truth.token_id
        assert score.logprob == pytest.approx(truth.logprob, abs=1e-3)
        values = [[value for _, value in each.top] for each in (score, truth)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)


@pytest.mark.parametrize(("notation", "times"), [("w4a16", 2), ("w4a8kv8", 1)])
def test_keys_and_values_of_full_precision_take_twice_as_much_on_a_cpu(tmp_path, notation, times):
    directory = save_checkpoint(tmp_path, notation)[1]
    options = EngineOptions(max_sequences=2, context_length=64)

    on_cpu, on_gpu = (kv_bytes_at_most(directory, options, place) for place in ("cpu", "cuda"))

    assert on_cpu == times * on_gpu > 0
