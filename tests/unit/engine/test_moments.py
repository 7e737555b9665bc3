"""Second-order rounding of whole blocks."""

import pytest
import torch

from engine.calibration.equivalence import fold_transform, install_transform
from engine.calibration.learn import learn_block
from engine.calibration.moments import round_by_moments
from engine.calibration.statistics import channel_statistics
from engine.calibration.twins import make_student
from engine.methods.recipes import method_of
from engine.methods.second_order import pass_errors_on
from engine.modules.swap import swap_modules
from engine.recipe import Ingredients, Recipe, SecondOrder
from tests.tiny_models import FAMILIES, save_tiny_model
from tests.unit.engine.block_tasks import ONLINE, QUIET, TOKENS, error_of, make_spec, make_task

SPEC = make_spec(w_bits=3, a_bits=16)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def folder(request, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), request.param)


def packed(task, student):
    swap_modules(student.block, student.pack())
    student.block.eval()
    return student.block


def plain_error(task, spec=SPEC):
    return error_of(packed(task, make_student(task, spec)), task)


def rounded_error(task, order, spec=SPEC):
    student = make_student(task, spec)
    round_by_moments(task, student, order, spec.kv_bits, QUIET)
    return error_of(packed(task, student), task)


@pytest.mark.parametrize("order", [SecondOrder.GPTQ, SecondOrder.GPTAQ])
def test_a_block_rounded_by_moments_is_closer_to_what_is_wanted(folder, order):
    task = make_task(folder, astray=0.02)

    assert rounded_error(task, order) < 0.8 * plain_error(task)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_blocks_of_every_family_gain(tmp_path, model_type):
    task = make_task(save_tiny_model(tmp_path, model_type, layers=1), astray=0.02)

    assert rounded_error(task, SecondOrder.GPTAQ) < plain_error(task)


def test_the_aim_helps_where_the_chains_differ(tmp_path):
    task = make_task(save_tiny_model(tmp_path), tokens=TOKENS.repeat(4, 1), astray=0.3)
    spec = make_spec(w_bits=6, a_bits=16)

    assert rounded_error(task, SecondOrder.GPTAQ, spec) < rounded_error(
        task, SecondOrder.GPTQ, spec
    )


def test_inputs_of_an_online_transform_are_counted_as_they_come_out(tmp_path):
    task = make_task(save_tiny_model(tmp_path), rotation=ONLINE, astray=0.02)

    assert rounded_error(task, SecondOrder.GPTAQ) < 0.8 * plain_error(task)


def test_a_block_whose_function_was_moved_between_layers_gains_as_well(tmp_path):
    task = make_task(save_tiny_model(tmp_path, "opt"), astray=0.02)
    spec = make_spec(w_bits=3, a_bits=8)

    def moved():
        student = make_student(task, spec)
        raw = channel_statistics(task.block, task.call, task.inputs)
        for parameter in install_transform(student, task.shape, raw):
            parameter.data += 0.1 * torch.randn_like(parameter)
        fold_transform(student, task.shape.norm)
        return student

    torch.manual_seed(5)
    plain = error_of(packed(task, moved()), task)
    torch.manual_seed(5)
    student = moved()
    round_by_moments(task, student, SecondOrder.GPTAQ, spec.kv_bits, QUIET)

    # a transformed twin that took raw inputs for its own would be far off
    assert error_of(packed(task, student), task) < 0.9 * plain


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest(tmp_path):
    task = make_task(save_tiny_model(tmp_path, "mixtral"), tokens=TOKENS[:1, :16])
    student = make_student(task, SPEC)
    task.block.mlp.gate.register_forward_hook(_to_the_first_experts)
    student.block.mlp.gate.register_forward_hook(_to_the_first_experts)
    plain = {name: each.codes() for name, each in student.twins.items()}

    round_by_moments(task, student, SecondOrder.GPTAQ, SPEC.kv_bits, QUIET)

    changed = {
        name for name, twin in student.twins.items() if not torch.equal(twin.codes(), plain[name])
    }
    experts = {name.split(".")[2] for name in changed if "experts" in name}
    assert experts == {"0", "1"}


def test_grids_stay_where_they_were(tmp_path):
    task = make_task(save_tiny_model(tmp_path))
    spec = make_spec(w_bits=3, a_bits=16, symmetric=True, group_size=32)
    student = make_student(task, spec)
    placed = {name: each.params() for name, each in student.twins.items()}

    round_by_moments(task, student, SecondOrder.GPTQ, spec.kv_bits, QUIET)

    for name, twin in student.twins.items():
        assert torch.equal(twin.params().scale, placed[name].scale)
        assert torch.equal(twin.params().zero_point, placed[name].zero_point)


def test_linears_that_are_given_the_same_tensor_share_its_moments(tmp_path, monkeypatch):
    task = make_task(save_tiny_model(tmp_path))
    student = make_student(task, SPEC)
    met = []

    def note(weight, params, grid, moments):
        met.append(moments)
        return pass_errors_on(weight, params, grid, moments)

    monkeypatch.setattr("engine.calibration.moments.pass_errors_on", note)
    round_by_moments(task, student, SecondOrder.GPTQ, SPEC.kv_bits, QUIET)

    # query, key and value; output; gate and up; down
    assert [sum(each is other for other in met) for each in met] == [3, 3, 3, 1, 2, 2, 1]


@pytest.mark.parametrize("order", SecondOrder)
def test_the_answer_of_the_spec_is_the_one_that_is_used(tmp_path, order):
    spec = make_spec(w_bits=3, recipe=Recipe.RTN, ingredients=Ingredients(second_order=order))
    task = make_task(save_tiny_model(tmp_path), astray=0.02)

    learned = learn_block(task, spec, method_of(spec), QUIET)

    assert (learned.loss_after < learned.loss_before) == (order is not SecondOrder.NONE)


def _to_the_first_experts(_, __, output):
    logits, weights, chosen = output
    return logits, weights, torch.tensor([0, 1]).expand_as(chosen)
