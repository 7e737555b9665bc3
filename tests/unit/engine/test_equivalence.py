"""The equivalent transformation keeps the function of every family's layer, and pays."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.calibration.block import run_windows
from engine.calibration.equivalence import fold_transform, install_compensation, install_transform
from engine.calibration.learn import learn_block
from engine.calibration.phases import Phases
from engine.calibration.statistics import channel_statistics
from engine.calibration.twins import make_student
from engine.families.base import PairKind
from engine.methods.base import ChannelStatistics
from engine.methods.recipes import method_of
from engine.methods.transforms import FactoredNorm, start_factor
from engine.modules.fake_quant import keep_range
from engine.modules.swap import swap_modules
from engine.numerics.hadamard import rotate_columns
from engine.recipe import Clipping, Ingredients, Recipe
from engine.spec import FULL_BITS, LayerOverride
from tests.tiny_models import FAMILIES, save_tiny_model
from tests.unit.engine.block_tasks import ONLINE, QUIET, error_of, make_spec, make_task

SHIFTED = {
    "llama-biased": ("llama", {}),
    "opt": ("opt", {}),
    "falcon-rw": ("falcon-rw", {}),
    "falcon-40b-biased": ("falcon-40b", {"bias": True}),
    "gemma2-biased": ("gemma2", {"attention_bias": True}),
}
CASES = {**{name: (name, {}) for name in FAMILIES}, **SHIFTED}
SPEC = make_spec(w_bits=8, a_bits=8)


@pytest.fixture(params=CASES)
def task(request, tmp_path):
    model_type, fields = CASES[request.param]
    return make_task(save_tiny_model(tmp_path, model_type, **fields))


class Unrounded(nn.Module):
    """What a twin multiplies with before it is rounded."""

    def __init__(self, twin):
        super().__init__()
        self.twin = twin

    def forward(self, x):
        weight, bias = self.twin.changed()
        return nn.functional.linear(x, weight, bias)


def transformed(task, spec=SPEC, *, noise=0.3):
    student = make_student(task, spec)
    raw = channel_statistics(task.block, task.call, task.inputs)
    parameters = install_transform(student, task.shape, raw)
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return student, parameters


def unrounded(student):
    swap_modules(student.block, {name: Unrounded(twin) for name, twin in student.twins.items()})
    return student.block


def assert_same(block, task):
    wanted = run_windows(task.block, task.call, task.inputs, FULL_BITS)
    found = run_windows(block, task.call, task.inputs, FULL_BITS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_random_factors_keep_the_function_of_the_layer(task):
    student, parameters = transformed(task)

    assert parameters
    assert_same(unrounded(student), task)


def test_folded_factors_keep_the_function_of_the_layer(task):
    student, _ = transformed(task)
    weights = {name: each.weight for name, each in student.twins.items()}

    fold_transform(student, task.shape.norm)

    assert not any(isinstance(each, FactoredNorm) for each in student.block.modules())
    assert not any(len(each.changes) for each in student.twins.values())
    changed = [
        name for name, each in student.twins.items() if not torch.equal(each.weight, weights[name])
    ]
    assert changed
    assert_same(unrounded(student), task)


def test_every_pair_without_a_router_has_its_factor(task):
    _, parameters = transformed(task)

    pairs = [each for each in task.shape.pairs if not each.readers]
    factors = [each for each in parameters if each.dim() == 1]
    heads = [each for each in parameters if each.dim() == 2]
    assert len(factors) >= len(pairs)
    assert len(heads) == 1


@pytest.mark.parametrize("name", SHIFTED)
def test_shifts_move_where_biases_can_take_them(tmp_path, name):
    model_type, fields = SHIFTED[name]
    task = make_task(save_tiny_model(tmp_path, model_type, **fields))

    _, rounded = transformed(task)
    _, exact = transformed(task, make_spec(a_bits=16))

    moved = [each for each in task.shape.pairs if each.shifts]
    assert len(rounded) == len(exact) + len(moved)


def test_every_factor_gets_a_gradient(tmp_path):
    task = make_task(save_tiny_model(tmp_path, "opt"))
    student, parameters = transformed(task, make_spec(w_bits=3, a_bits=4), noise=0.0)
    student.trains(on=True)

    seen = task.call.run(student.block, task.inputs)
    (seen - task.wanted).square().mean().backward()

    assert all(bool(each.grad.abs().sum() > 0) for each in parameters)


def test_a_pair_with_a_linear_in_full_precision_takes_no_part(tmp_path):
    task = make_task(save_tiny_model(tmp_path))
    kept = LayerOverride(pattern="*.down_proj", w_bits=16)

    student, parameters = transformed(task, make_spec(overrides=(kept,)))

    everything, _ = transformed(task)
    assert len(student.twins["mlp.up_proj"].changes) == 1
    assert len(everything.twins["mlp.up_proj"].changes) == 2
    assert_same(unrounded(student), task)
    assert parameters


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt", "gemma2", "falcon-rw", "mixtral"])
def test_training_the_transformation_brings_the_loss_down(tmp_path, model_type):
    spec = make_spec(
        w_bits=4,
        a_bits=4,
        epochs=16,
        batch=1,
        recipe=Recipe.RTN,
        ingredients=Ingredients(equivalent_transform=True),
    )
    task = make_task(save_tiny_model(tmp_path, model_type))
    untrained = make_student(task, spec)
    raw = channel_statistics(task.block, task.call, task.inputs)
    transform = install_transform(untrained, task.shape, raw)
    untrained.trains(on=False)
    before = error_of(untrained.block, task)

    phases = Phases(task=task, spec=spec, method=method_of(spec), student=untrained, watch=QUIET)
    phases.train_ranges(transform)

    assert error_of(untrained.block, task) < 0.95 * before


def test_loud_channels_are_what_the_transformation_is_for(tmp_path):
    task = make_task(save_tiny_model(tmp_path, "llama"), astray=0.0)
    task.block.input_layernorm.weight.data[::9] *= 30
    for name in ("q_proj", "k_proj", "v_proj"):
        task.block.self_attn.get_submodule(name).weight.data[:, ::9] /= 30
    ingredients = Ingredients(equivalent_transform=True)
    spec = make_spec(w_bits=4, a_bits=4, recipe=Recipe.RTN, ingredients=ingredients)

    learned = learn_block(task, spec, method_of(spec), QUIET)

    assert learned.loss_after < 0.7 * learned.loss_before
    assert "input_layernorm.weight" in learned.others


def test_the_shift_is_the_middle_of_what_all_heads_of_a_group_are_given(tmp_path):
    task = make_task(save_tiny_model(tmp_path, "llama"))
    [pair] = [each for each in task.shape.pairs if each.kind is PairKind.LINEAR and each.shifts]
    generator = torch.Generator().manual_seed(1)
    low = -torch.rand(64, generator=generator) + 3
    high = low + torch.rand(64, generator=generator)
    statistics = ChannelStatistics(power=high.square(), low=low, high=high)
    weights = {name: torch.ones(8, 64) for name in pair.consumers}

    factor = start_factor(pair, statistics, weights, shifts=True)

    heads = (2, pair.repeats, pair.head_dim)
    together = (low.view(heads).amin(1) + high.view(heads).amax(1)) / 2
    torch.testing.assert_close(factor.shift.data, together.flatten())


def test_a_channel_that_was_never_heard_starts_at_one(tmp_path):
    task = make_task(save_tiny_model(tmp_path, "llama"))
    pair = task.shape.pairs[0]
    power = torch.ones(64)
    power[5] = 0
    statistics = ChannelStatistics(power=power, low=-power, high=power)
    weights = {name: torch.full((8, 64), 0.25) for name in pair.consumers}

    factor = start_factor(pair, statistics, weights, shifts=False)

    assert factor()[5].item() == 1
    torch.testing.assert_close(factor()[0], torch.tensor(2.0))


def test_clips_are_placed_on_what_an_online_transform_makes_of_a_weight(tmp_path):
    task = make_task(save_tiny_model(tmp_path), rotation=ONLINE)
    ingredients = Ingredients(clipping=Clipping.SEARCHED)
    spec = make_spec(a_bits=16, recipe=Recipe.RTN, ingredients=ingredients)
    down = task.block.mlp.down_proj.weight
    given = []

    class Noting:
        def clip_for(self, weight, grid, power):
            given.append(weight)
            return keep_range

    learn_block(task, spec, replace(method_of(spec), clipping=Noting()), QUIET)

    turned = rotate_columns(down, task.shape.hadamards["mlp.down_proj"])
    [seen] = [each for each in given if each.shape == (64, 128)]
    assert torch.equal(seen, turned)


@pytest.mark.parametrize("model_type", ["falcon-7b", "opt-350m", "opt", "mixtral", "phi3"])
def test_the_last_linears_of_every_family_are_compensated(tmp_path, model_type):
    task = make_task(save_tiny_model(tmp_path, model_type))
    student = make_student(task, SPEC)

    parameters = install_compensation(student, task)

    changed = [name for name, twin in student.twins.items() if twin.changes]
    assert len(parameters) == 2 * len(changed)
    wanted = {"falcon-7b": "mlp.dense_4h_to_h", "opt-350m": "fc2", "opt": "fc2"}
    assert all(name.endswith(wanted.get(model_type, "down_proj")) for name in changed)
    assert len(changed) == (4 if model_type == "mixtral" else 1)
