import pytest
import torch

from engine.checkpoint.reader import load_checkpoint
from engine.evaluation import scoring
from engine.evaluation.scoring import Continuation, Scorer
from engine.inference.kv_cache import make_cache
from engine.models.loading import load_full_precision
from tests.tiny_models import FAMILIES, save_tiny_model
from tests.unit.engine.quantized_models import save_checkpoint


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())


WANTED = [
    Continuation(context=tokens(length, length), continuation=tokens(1 + length % 4, 99 - length))
    for length in (3, 20, 7, 33, 1, 12)
]


def scorer_of(model, **fields):
    return Scorer(model=model, layers=2, vocabulary=260, **{"context_length": 256, **fields})


def ignore(count):
    """Take how many are done and do nothing."""


def alone(model, each, kv_bits=16):
    """The score of one continuation, by the plainest means."""
    ids = torch.tensor([[*each.context, *each.continuation]])
    cache = make_cache(2, kv_bits)
    with torch.no_grad():
        logits = model(ids[:, :-1], past_key_values=cache, use_cache=True).logits[0]
    kept = logits[len(each.context) - 1 :].log_softmax(-1)
    targets = torch.tensor(each.continuation)
    chosen = kept.gather(-1, targets[:, None])
    return float(chosen.sum()), bool((kept.argmax(-1) == targets).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_scores_each_as_if_it_were_alone(tmp_path, family):
    model = load_full_precision(save_tiny_model(tmp_path, family))

    scores = scorer_of(model).score(WANTED, ignore)

    for score, each in zip(scores, WANTED, strict=True):
        assert score.log_likelihood == pytest.approx(alone(model, each)[0], rel=1e-4)


def test_small_batches_score_the_same(tmp_path, monkeypatch):
    scorer = scorer_of(load_full_precision(save_tiny_model(tmp_path)))
    whole, counts = scorer.score(WANTED, ignore), []

    monkeypatch.setattr(scoring, "BATCH_TOKENS", 40)

    for small, large in zip(scorer.score(WANTED, counts.append), whole, strict=True):
        assert small.log_likelihood == pytest.approx(large.log_likelihood, rel=1e-4)
    assert len(counts) > 2
    assert sum(counts) == len(WANTED)


def test_logits_bound_a_batch_as_well(tmp_path, monkeypatch):
    scorer, counts = scorer_of(load_full_precision(save_tiny_model(tmp_path))), []

    monkeypatch.setattr(scoring, "BATCH_LOGITS", 1)
    scorer.score(WANTED, counts.append)

    assert counts == [1] * len(WANTED)


def test_what_the_model_itself_would_say_is_greedy(tmp_path):
    model = load_full_precision(save_tiny_model(tmp_path))
    context = tokens(9, 1)
    with torch.no_grad():
        first = int(model(torch.tensor([context])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*context, first]])).logits[0, -1].argmax())

    said, other = scorer_of(model).score(
        [
            Continuation(context=context, continuation=(first, second)),
            Continuation(context=context, continuation=(first, (second + 1) % 256)),
        ],
        ignore,
    )

    assert said.is_greedy
    assert not other.is_greedy


def test_keys_and_values_are_rounded_as_generation_rounds_them(tmp_path):
    _, checkpoint, _ = save_checkpoint(tmp_path, "w8a8kv3")
    model = load_checkpoint(checkpoint).model

    # one alone, since a row of a batch is rounded by itself
    [score] = scorer_of(model, kv_bits=3).score(WANTED[1:2], ignore)

    assert score.log_likelihood == pytest.approx(alone(model, WANTED[1], 3)[0], rel=1e-4)
    assert score.log_likelihood != pytest.approx(alone(model, WANTED[1])[0], rel=1e-6)


def test_of_a_context_that_is_too_long_the_end_is_kept(tmp_path):
    model = load_full_precision(save_tiny_model(tmp_path))
    long = Continuation(context=tokens(50, 1), continuation=tokens(2, 2))
    short = Continuation(context=long.context[-15:], continuation=long.continuation)

    cut, whole = (
        scorer_of(model, context_length=limit).score([each], ignore)[0]
        for limit, each in ((16, long), (256, short))
    )

    assert cut.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-5)


def test_a_continuation_beyond_the_models_positions_is_refused(tmp_path):
    scorer = scorer_of(load_full_precision(save_tiny_model(tmp_path)), context_length=4)

    with pytest.raises(ValueError, match="does not fit the model's 4 positions"):
        scorer.score([Continuation(context=(1,), continuation=tokens(5, 1))], ignore)
