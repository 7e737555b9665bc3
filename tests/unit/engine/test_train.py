"""How parameters are trained, and what each of them brings to a block."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.calibration.learn import learn_block
from engine.calibration.phases import Phases
from engine.calibration.stepper import Examples, ParameterGroup, Schedule
from engine.calibration.train import LOWER_RATE, MAX_RETRIES, TrainingDiverged, train
from engine.calibration.twins import make_student
from engine.calibration.watch import Watch
from engine.events import LogLine, Progress
from engine.methods.losses import BlockLoss
from engine.methods.recipes import method_of
from engine.recipe import Clipping, Ingredients, Recipe, Rounding
from tests.tiny_models import save_tiny_model
from tests.unit.engine.block_tasks import QUIET, make_spec, make_task

WINDOWS = 5
LEARNERS = {
    "offsets": Ingredients(rounding=Rounding.LEARNED),
    "weights": Ingredients(rounding=Rounding.TRAINED),
    "clips": Ingredients(clipping=Clipping.LEARNED),
    "factors": Ingredients(clipping=Clipping.FACTORS),
    "compensation": Ingredients(compensation=True),
    "transformation": Ingredients(equivalent_transform=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def spec_of(name, **fields):
    values = {"w_bits": 2, "a_bits": 8, "group_size": 32, "epochs": 20, "batch": 1}
    return make_spec(recipe=Recipe.RTN, ingredients=LEARNERS[name], **{**values, **fields})


def make_examples():
    inputs = torch.randn(WINDOWS, 3, 4, generator=torch.Generator().manual_seed(1))
    return Examples(
        inputs=inputs,
        wanted=2 * inputs,
        own=None,
        full_inputs=None,
        token_weight=torch.ones(WINDOWS, 3, 1),
    )


def make_schedule(**fields):
    values = {
        "epochs": 30,
        "batch": 2,
        "seed": 3,
        "done": 0,
        "total": 90,
        "device": torch.device("cpu"),
        "can_record": False,
    }
    return Schedule(**{**values, **fields})


class Toy:
    """One factor that shall become two; sees which windows come by."""

    def __init__(self, broken=(), louder=()):
        self.factor = nn.Parameter(torch.ones(()))
        self.broken, self.louder = set(broken), set(louder)
        self.batches, self.after_steps = [], []

    def loss(self, batch):
        self.batches.append(batch.inputs)
        loss = (batch.inputs * self.factor - batch.wanted).square().mean()
        step = len(self.batches)
        return loss * (math.nan if step in self.broken else 100 if step in self.louder else 1)

    def bound(self):
        self.after_steps.append(self.factor.item())

    def train(self, rate=0.1, watch=QUIET, **fields):
        groups = [ParameterGroup(parameters=[self.factor], rate=rate)]
        train(self.loss, make_examples(), groups, self.bound, make_schedule(**fields), watch)
        return self


def test_training_finds_what_is_wanted():
    assert Toy().train().factor.item() == pytest.approx(2, abs=0.02)


def test_every_epoch_shows_every_window_once_also_where_batches_are_ragged():
    toy = Toy().train(epochs=2)

    assert sorted(len(each) for each in toy.batches) == [1, 1, 2, 2, 2, 2]
    seen = torch.cat(toy.batches[:3])
    assert sorted(seen[:, 0, 0].tolist()) == sorted(make_examples().inputs[:, 0, 0].tolist())
    assert len(toy.after_steps) == 6


def test_equal_seeds_take_equal_steps_and_other_seeds_others():
    first, again, other = Toy().train(), Toy().train(), Toy().train(seed=4)

    assert torch.equal(first.factor, again.factor)
    assert not torch.equal(torch.cat(first.batches[:3]), torch.cat(other.batches[:3]))


def test_the_best_epoch_is_what_remains():
    toy = Toy(louder=range(7, 13)).train(epochs=4)

    assert toy.factor.item() == toy.after_steps[5]
    assert len(toy.after_steps) == 12
    assert toy.after_steps[5] != toy.after_steps[-1]


def test_progress_counts_every_step():
    events = []

    Toy().train(watch=Watch(on_event=events.append), done=10, total=100, epochs=30)

    told = [each for each in events if isinstance(each, Progress)]
    assert told[0].done == 11
    assert all(each.total == 100 for each in told)
    last = []
    Toy().train(watch=Watch(on_event=last.append))
    assert last[-1].done == last[-1].total == 90


def test_one_loss_that_is_not_finite_lowers_the_rate_and_goes_on():
    events = []
    toy = Toy(broken=[7]).train(watch=Watch(on_event=events.append))

    said = [each.message for each in events if isinstance(each, LogLine)]
    assert said == [f"a loss was not finite; going on at {LOWER_RATE:.2g} of the learning rate"]
    assert toy.factor.item() == pytest.approx(2, abs=0.1)


def test_what_was_best_before_a_loss_that_was_not_finite_is_kept():
    toy = Toy(broken=[7], louder=range(8, 100)).train(epochs=3)

    # two epochs went well; the second attempt began there and found nothing better
    assert len(toy.after_steps) == 9 + 9
    assert toy.factor.item() == toy.after_steps[5]


def test_losses_that_stay_not_finite_end_in_the_start():
    events = []
    toy = Toy(broken=range(1, 1000))

    with pytest.raises(TrainingDiverged):
        toy.train(watch=Watch(on_event=events.append))

    assert toy.factor.item() == 1
    assert len([each for each in events if isinstance(each, LogLine)]) == MAX_RETRIES


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_learned_brings_the_loss_of_a_block_down(folder, name):
    spec = spec_of(name)
    task = make_task(folder)

    learned = learn_block(task, spec, method_of(spec), QUIET)

    assert learned.loss_after < 0.97 * learned.loss_before
    assert not learned.fell_back


@pytest.mark.parametrize("name", ["offsets", "weights"])
def test_equal_seeds_learn_equal_codes(folder, name):
    spec = spec_of(name, epochs=3)

    first = learn_block(make_task(folder), spec, method_of(spec), QUIET)
    again = learn_block(make_task(folder), spec, method_of(spec), QUIET)

    for short, layer in first.layers.items():
        assert torch.equal(layer.weight_packed, again.layers[short].weight_packed)


@pytest.mark.parametrize(("name", "farthest"), [("offsets", 0.5), ("weights", math.inf)])
def test_learned_offsets_stay_within_half_a_step_and_weights_anywhere(folder, name, farthest):
    spec = spec_of(name)
    task = make_task(folder)
    student = make_student(task, spec)
    fast = replace(method_of(spec), rounding_rate=0.2)

    Phases(task=task, spec=spec, method=fast, student=student, watch=QUIET).train_rounding()

    reached = max(float(each.offset.detach().abs().max()) for each in student.twins.values())
    assert 0.3 < reached <= farthest
    assert (reached > 0.5) == (farthest > 0.5)


def test_a_block_is_trained_further_from_where_columns_left_it(folder):
    ingredients = Ingredients(rounding=Rounding.LEARNED)
    spec = make_spec(
        w_bits=2, a_bits=16, epochs=10, batch=1, recipe=Recipe.FAST, ingredients=ingredients
    )
    fast = replace(spec, ingredients=Ingredients())

    start = learn_block(make_task(folder), fast, method_of(fast), QUIET)
    learned = learn_block(make_task(folder), spec, method_of(spec), QUIET)

    assert start.loss_after < start.loss_before
    assert learned.loss_after < 0.97 * start.loss_after


def test_phases_count_all_steps_of_a_block(folder):
    ingredients = Ingredients(clipping=Clipping.LEARNED, rounding=Rounding.LEARNED)
    spec = make_spec(epochs=6, batch=3, recipe=Recipe.RTN, ingredients=ingredients)
    events = []

    task = make_task(folder, index=1)
    learn_block(task, spec, method_of(spec), Watch(on_event=events.append))

    # four windows in batches of three are two steps; two blocks of six epochs
    last = [each for each in events if isinstance(each, Progress)][-1]
    assert (last.done, last.total) == (2 * 6 * 2, 2 * 6 * 2)


def test_a_block_whose_losses_stay_not_finite_is_rounded_plainly_and_says_so(folder):
    spec = spec_of("offsets", epochs=2)
    events = []
    method = replace(method_of(spec), loss=BrokenLoss())
    plain = make_spec(w_bits=2, group_size=32, recipe=Recipe.RTN)

    learned = learn_block(make_task(folder), spec, method, Watch(on_event=events.append))

    wanted = learn_block(make_task(folder), plain, method_of(plain), QUIET)
    assert learned.fell_back
    assert learned.loss_after == learned.loss_before
    for name, layer in learned.layers.items():
        assert torch.equal(layer.weight_packed, wanted.layers[name].weight_packed)
    said = [each.message for each in events if isinstance(each, LogLine)]
    assert said[-1] == "model.layers.0: losses were not finite; plain rounding is kept"


class BrokenLoss(BlockLoss):
    """Is never finite."""

    def __call__(self, outputs):
        return super().__call__(outputs) * math.nan
