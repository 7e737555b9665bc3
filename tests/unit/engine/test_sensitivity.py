"""What rounding one linear costs, on tiny models with random weights."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from engine.calibration.watch import Watch
from engine.effort import plan_search, search_units
from engine.errors import CalibrationDiverged, CalibrationInterrupted
from engine.events import Progress, Stage
from engine.models.blocks import ResidentModel
from engine.models.loading import SourceModel, load_full_precision
from engine.search.divergence import divergences
from engine.search.measurements import MeasurementStore
from engine.search.perturb import round_weight, rounded_inputs, rounded_weights
from engine.search.sensitivity import Sensitivity, losses_of
from engine.spec import CalibrationSpec, QuantSpec
from engine.target import BitTarget
from kernels.activation_rounding import round_activations
from tests.tiny_models import save_tiny_model

LAYERS = 3
WIDTHS = (2, 3, 4, 6, 8)
SPEC = QuantSpec(
    w_bits=4,
    a_bits=8,
    target=BitTarget(average_bits=4, w_choices=WIDTHS, a_choices=(4, 8, 16)),
    calibration=CalibrationSpec(samples=2, length=32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("source"), layers=LAYERS)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))


class CountingModel:
    """A model on disk that counts how often its blocks are loaded."""

    def __init__(self, source):
        self._source = source
        self.loaded = []

    def __getattr__(self, name):
        return getattr(self._source, name)

    def load_block(self, index):
        self.loaded.append(index)
        return self._source.load_block(index)


def searching(folder, state, *, spec=SPEC, watch=None, model=None, **plan):
    source = model or SourceModel.open(folder)
    units = search_units(source.architecture, spec)
    planned = plan_search(source.architecture, spec, units, "cuda")
    return Sensitivity(
        model=source,
        spec=spec,
        units=units,
        plan=replace(planned, **plan),
        store=MeasurementStore.open(state, "mark"),
        watch=watch or Watch(on_event=lambda _: None),
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def exact(folder, tokens, tmp_path_factory):
    """Every candidate followed to the logits."""
    search = searching(folder, tmp_path_factory.mktemp("state"))
    search.measure(tokens)
    return search


def test_a_loss_is_the_divergence_of_the_whole_model_with_one_rounded_linear(folder, tokens, exact):
    model = load_full_precision(folder)
    rounded = copy.deepcopy(model)
    name = "model.layers.1.self_attn.v_proj"
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: caught.append(x[0]))
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens).logits.double(), -1)
        handle.remove()
        power = caught[0].square().mean((0, 1))
        linear = rounded.get_submodule(name)
        linear.weight.data = round_weight(linear.weight, SPEC.weight_grid(name), power)
        log_q = torch.log_softmax(rounded(tokens).logits.double(), -1)

    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    measured = exact.store.units[name].weights[4].divergence
    assert measured == pytest.approx(expected, rel=1e-3)


def test_losses_of_inputs_are_those_of_the_model_with_rounded_inputs(folder, tokens, exact):
    model = load_full_precision(folder)
    name = "model.layers.2.mlp.down_proj"
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens).logits.double(), -1)
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x: (round_activations(x[0], 4),)
        )
        log_q = torch.log_softmax(model(tokens).logits.double(), -1)

    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    measured = exact.store.units[name].activations
    assert measured[4].divergence == pytest.approx(expected, rel=1e-3)
    assert 16 not in measured


def test_losses_fall_with_the_width(exact):
    for unit in exact.store.units.values():
        losses = [unit.weights[bits].divergence for bits in WIDTHS]
        errors = [unit.weights[bits].error for bits in WIDTHS]

        assert all(wide < narrow for narrow, wide in itertools.pairwise(losses))
        assert all(wide < narrow for narrow, wide in itertools.pairwise(errors))
        assert unit.activations[8].divergence < unit.activations[4].divergence


def ranks(values):
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(index) for index in range(len(values))]


def rank_correlation(first, second):
    pairs = torch.tensor([ranks(first), ranks(second)], dtype=torch.float64)
    return float(torch.corrcoef(pairs)[0, 1])


@pytest.mark.parametrize("anchors", [1, 2])
def test_scaled_losses_order_the_candidates_as_exact_ones_do(
    folder, tokens, exact, tmp_path, anchors
):
    scaled = searching(folder, tmp_path, anchors=anchors)
    scaled.measure(tokens)

    told, true = [], []
    for name, unit in scaled.store.units.items():
        full = exact.store.units[name]
        followed = [each for each in unit.weights.values() if each.divergence is not None]
        assert len(followed) == anchors
        told += losses_of(unit.weights, WIDTHS, {}).values()
        told += losses_of(unit.activations, (4, 8), unit.weights).values()
        true += [full.weights[bits].divergence for bits in WIDTHS]
        true += [full.activations[bits].divergence for bits in (4, 8)]
    assert rank_correlation(told, true) > 0.97
    ratios = torch.tensor(told) / torch.tensor(true)
    assert 0.5 < ratios.median() < 2


def test_single_losses_add_up(folder, tokens, exact, tmp_path):
    model = ResidentModel(
        architecture=exact.model.architecture, skeleton=load_full_precision(folder)
    )
    names = list(exact.store.units)
    whole = model.skeleton
    linears = [whole.get_submodule(name) for name in names]
    weights = [
        round_weight(each.weight, SPEC.weight_grid(name), torch.ones(each.in_features))
        for name, each in zip(names, linears, strict=True)
    ]
    with torch.no_grad():
        hidden = whole.model(tokens).last_hidden_state
        with rounded_weights(linears, weights):
            rounded = whole.model(tokens).last_hidden_state

    [together] = divergences(whole.lm_head, hidden, [rounded], check=lambda: None)

    alone = sum(exact.store.units[name].weights[4].divergence for name in names)
    assert together == pytest.approx(alone, rel=0.4)


def test_how_many_blocks_wait_together_changes_nothing(folder, tokens, exact, tmp_path):
    alone = searching(folder, tmp_path, wave_blocks=1)

    alone.measure(tokens)

    assert alone.store.units == exact.store.units


def test_what_is_measured_is_not_measured_again(folder, tokens, exact):
    model = CountingModel(SourceModel.open(folder))
    again = searching(folder, exact.store.path.parent, model=model)

    again.measure(tokens)

    assert model.loaded == []
    assert again.store.units == exact.store.units


def test_a_stopped_search_goes_on_behind_its_last_wave(folder, tokens, exact, tmp_path):
    done = (tmp_path / "search.json").exists
    stopped = searching(
        folder, tmp_path, wave_blocks=1, watch=Watch(on_event=lambda _: None, should_stop=done)
    )
    with pytest.raises(CalibrationInterrupted):
        stopped.measure(tokens)
    model = CountingModel(SourceModel.open(folder))
    resumed = searching(folder, tmp_path, wave_blocks=1, model=model)
    assert {name.split(".")[2] for name in resumed.store.units} == {"0"}

    resumed.measure(tokens)

    # through block 0, then what lies behind each missing block
    assert model.loaded == [0, 1, 2, 1, 2]
    assert resumed.store.units == exact.store.units


def test_measurements_of_other_widths_or_damaged_ones_are_not_taken_up(exact, tmp_path):
    path = tmp_path / "search.json"
    path.write_bytes(exact.store.path.read_bytes())

    assert MeasurementStore.open(tmp_path, "mark").units == exact.store.units
    assert MeasurementStore.open(tmp_path, "another").units == {}
    path.write_bytes(path.read_bytes()[:-20])
    assert MeasurementStore.open(tmp_path, "mark").units == {}


def test_progress_ends_with_all_blocks_of_all_waves(folder, tokens, tmp_path):
    events = []
    search = searching(folder, tmp_path, wave_blocks=2, watch=Watch(on_event=events.append))

    search.measure(tokens)

    last = [each for each in events if isinstance(each, Progress)][-1]
    assert last == Progress(stage=Stage.SEARCHING, done=4, total=4, unit="block")


def test_a_layer_that_is_not_finite_is_named(tokens, tmp_path):
    broken = load_full_precision(save_tiny_model(tmp_path / "source", layers=1))
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    source = SourceModel.open(tmp_path / "source")
    model = ResidentModel(architecture=source.architecture, skeleton=broken)

    with pytest.raises(CalibrationDiverged) as diverged:
        searching(None, tmp_path / "state", model=model).measure(tokens)

    assert diverged.value.layer.startswith("model.layers.0.")


def test_a_perturbed_block_is_itself_again_afterwards():
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(3, 8)
    before = linear(x)

    with rounded_weights([linear], [torch.zeros(4, 8)]), rounded_inputs([linear], 2):
        assert torch.equal(linear(x), linear.bias.expand(3, 4))

    assert torch.equal(linear(x), before)


def test_divergences_are_exact_where_float32_sums_are_not():
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 6, 500, generator=chance)
    near = hidden + 1e-4 * torch.randn(hidden.shape, generator=chance)

    [measured] = divergences(torch.nn.Identity(), hidden, [near], check=lambda: None)

    log_p, log_q = (torch.log_softmax(each.double(), -1) for each in (hidden, near))
    exact = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert exact < 1e-8
    assert measured == pytest.approx(exact, rel=1e-2)


def test_predictions_that_share_nothing_still_have_a_finite_divergence():
    first, second = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    first[..., 0], second[..., 1] = 1000.0, 1000.0

    [measured] = divergences(torch.nn.Identity(), first, [second], check=lambda: None)

    assert measured == pytest.approx(1000.0)
