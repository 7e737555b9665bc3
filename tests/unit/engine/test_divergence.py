import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.calibration.watch import Watch
from engine.checkpoint.reader import load_checkpoint
from engine.errors import CalibrationInterrupted
from engine.evaluation import divergence
from engine.evaluation.chain import Chain
from engine.evaluation.divergence import compare_chains
from engine.evaluation.perplexity import measure_perplexity
from engine.events import Progress
from engine.models.blocks import ResidentModel
from engine.models.loading import SourceModel
from tests.unit.engine.quantized_models import save_checkpoint

TOKENS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
SILENT = Watch(on_event=lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder, "w3a8g32")
    return folder


@pytest.fixture
def source(folder):
    return SourceModel.open(folder / "source")


@pytest.fixture
def result(folder):
    loaded = load_checkpoint(folder / "checkpoint")
    return ResidentModel(architecture=loaded.architecture, skeleton=loaded.model)


def compare(source, result, watch=SILENT, **options):
    chains = [Chain.start(each, TOKENS) for each in (source, result)]
    return compare_chains(*chains, TOKENS, watch, **options)


def test_divergence_is_that_of_whole_softmaxes_in_double_precision(folder, source, result):
    full = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    with torch.no_grad():
        log_p, log_q = (
            model(TOKENS).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
            for model in (full, result.skeleton)
        )
    each = (log_p.exp() * (log_p - log_q)).sum(-1)

    measured = compare(source, result).divergence

    assert measured.mean == pytest.approx(float(each.mean()), rel=1e-3)
    assert measured.max == pytest.approx(float(each.max()), rel=1e-3)
    # 117 tokens: the 116th in order is the first that 99 of 100 do not pass
    assert measured.p99 == pytest.approx(float(each.sort().values[115]), rel=1e-3)
    assert measured.top1_agreement == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    )


def test_perplexities_are_those_of_either_model_alone(source, result):
    compared = compare(source, result)

    for model, perplexity in ((source, compared.fp), (result, compared.quant)):
        alone = measure_perplexity(model, TOKENS, SILENT)
        assert perplexity.value == pytest.approx(alone.value, rel=1e-6)
        assert perplexity.tokens == alone.tokens


def test_layer_errors_are_relative_to_what_the_layer_should_put_out(folder, source, result):
    full = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    seen = []
    for model in (full, result.skeleton):
        # the library's own last hidden state is behind the norm, so the layers are asked
        outputs = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out, kept=outputs: kept.append(out))
            for layer in model.get_submodule("model.layers")
        ]
        with torch.no_grad():
            model(TOKENS)
        for hook in hooks:
            hook.remove()
        seen.append(outputs)

    errors = compare(source, result).layer_errors

    wanted = [
        float((got - due).square().sum() / due.square().sum())
        for due, got in zip(*seen, strict=True)
    ]
    assert errors == pytest.approx(wanted, rel=1e-3)
    assert len(errors) == 2


def test_a_model_beside_itself_differs_in_nothing(source):
    compared = compare(source, source)

    assert compared.divergence.mean == compared.divergence.max == 0
    assert compared.divergence.top1_agreement == 1
    assert compared.layer_errors == (0, 0)
    assert compared.fp == compared.quant


def test_a_rotated_stream_is_turned_back_before_layers_are_compared(source):
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q

    turned = compare(source, source, to_source_basis=lambda hidden: hidden @ turn)

    assert min(turned.layer_errors) > 0.1
    assert turned.divergence.mean == 0


def test_the_chunk_of_the_heads_does_not_change_the_result(source, result, monkeypatch):
    whole = compare(source, result)

    monkeypatch.setattr(divergence, "HEAD_CHUNK", 7)

    chunked = compare(source, result)
    assert chunked.divergence.mean == pytest.approx(whole.divergence.mean, rel=1e-5)
    assert chunked.quant.value == pytest.approx(whole.quant.value, rel=1e-6)


@pytest.mark.parametrize("batch", [2, 8])
def test_windows_that_run_together_do_not_see_each_other(source, result, batch):
    alone = compare(source, result)

    chains = [Chain.start(each, TOKENS, batch=batch, kv_bits=16) for each in (source, result)]
    together = compare_chains(*chains, TOKENS, SILENT)

    assert together.fp.value == pytest.approx(alone.fp.value, rel=1e-5)
    assert together.quant.value == pytest.approx(alone.quant.value, rel=1e-5)
    assert together.layer_errors == pytest.approx(alone.layer_errors, rel=1e-3)


def test_a_probability_that_is_not_finite_is_refused(source, result):
    spoiled = result.skeleton.get_submodule("model.norm").weight
    spoiled[3] = torch.nan

    with pytest.raises(ValueError, match="not finite"):
        compare(source, result)


def test_a_stop_ends_the_comparison(source, result):
    watch = Watch(on_event=lambda _: None, should_stop=lambda: True)

    with pytest.raises(CalibrationInterrupted):
        compare(source, result, watch)


def test_progress_counts_the_blocks_of_both(source, result):
    events = []

    compare(source, result, Watch(on_event=events.append))

    last = [each for each in events if isinstance(each, Progress)][-1]
    assert last.done == last.total == 2 * 2 * 3
