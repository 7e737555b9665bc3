import math

import pytest
import torch

from engine.calibration.watch import Watch
from engine.errors import CalibrationInterrupted
from engine.evaluation import perplexity
from engine.evaluation.perplexity import Perplexity, measure_perplexity
from engine.events import Progress
from engine.models.loading import SourceModel
from tests.tiny_models import FAMILIES, load_reference, save_tiny_model

TOKENS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_perplexity_is_that_of_the_librarys_loss(tmp_path, model_type):
    folder = save_tiny_model(tmp_path, model_type)
    model = load_reference(folder, model_type)
    with torch.no_grad():
        wanted = math.exp(float(model(TOKENS, labels=TOKENS).loss))

    measured = measure_perplexity(SourceModel.open(folder), TOKENS, Watch(on_event=lambda _: None))

    assert measured.value == pytest.approx(wanted, rel=1e-5)
    assert measured.tokens == 3 * 39


def test_the_chunk_of_the_head_does_not_change_the_result(folder, monkeypatch):
    source, watch = SourceModel.open(folder), Watch(on_event=lambda _: None)
    whole = measure_perplexity(source, TOKENS, watch)

    monkeypatch.setattr(perplexity, "HEAD_CHUNK", 7)

    assert measure_perplexity(source, TOKENS, watch).value == pytest.approx(whole.value, rel=1e-6)


def test_coarser_keys_and_values_change_perplexity(folder):
    source, watch = SourceModel.open(folder), Watch(on_event=lambda _: None)

    plain = measure_perplexity(source, TOKENS, watch)
    rounded = measure_perplexity(source, TOKENS, watch, kv_bits=2)

    assert rounded.value != plain.value


def test_a_perplexity_beyond_every_number_is_a_failure():
    assert Perplexity.of_losses([700.0], 1).value == math.exp(700)

    with pytest.raises(ValueError, match="not finite: 710 nats"):
        Perplexity.of_losses([1420.0], 2)


def test_a_stop_ends_the_measurement(folder):
    watch = Watch(on_event=lambda _: None, should_stop=lambda: True)

    with pytest.raises(CalibrationInterrupted):
        measure_perplexity(SourceModel.open(folder), TOKENS, watch)


def test_progress_ends_at_its_total(folder):
    events = []

    measure_perplexity(SourceModel.open(folder), TOKENS, Watch(on_event=events.append))

    last = [each for each in events if isinstance(each, Progress)][-1]
    assert last.done == last.total == 2 * 3
