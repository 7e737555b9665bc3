"""What is seen and changed inside attention."""

import math

import pytest
import torch

from engine.architecture import check_config
from engine.calibration.attention import AttentionTeacher
from engine.calibration.block import run_windows
from engine.calibration.capture import capture_inputs
from engine.calibration.learn import learn_block
from engine.calibration.twins import make_student
from engine.checkpoint.reader import load_checkpoint
from engine.errors import SpecError
from engine.fit import check_spec
from engine.inference.kv_cache import make_cache
from engine.methods.recipes import method_of
from engine.models.blocks import ResidentModel
from engine.models.loading import read_config
from engine.modules.attention import AttentionProbe, round_queries
from engine.recipe import Ingredients, Recipe
from engine.spec import FULL_BITS, QuantSpec
from kernels.activation_rounding import round_activations
from tests.tiny_models import FAMILIES, TINY, save_tiny_model
from tests.unit.engine.block_tasks import QUIET, TOKENS, make_spec, make_task
from tests.unit.engine.quantized_models import save_checkpoint

SDPA = [name for name in FAMILIES if TINY[name].attention == "sdpa"]
COARSE = QuantSpec(w_bits=8, a_bits=8, q_bits=4, kv_bits=8)


def probed(task, block):
    probe = AttentionProbe()
    with torch.no_grad(), probe:
        task.call.run(block, task.full_inputs[:2])
    return probe.seen


@pytest.mark.parametrize("model_type", SDPA)
def test_maps_are_those_that_attention_weighs_values_by(tmp_path, model_type, monkeypatch):
    task = make_task(save_tiny_model(tmp_path, model_type))
    plain = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def note(query, key, value, **others):
        calls.append((value, plain(query, key, value, **others)))
        return calls[-1][1]

    seen = probed(task, task.block)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    probed(task, task.block)

    value, wanted = calls[-1]
    value = value.repeat_interleave(wanted.shape[1] // value.shape[1], dim=1)
    for window in range(2):
        weighed = seen.log_probabilities(window).exp() @ value[window]
        torch.testing.assert_close(weighed, wanted[window], rtol=1e-4, atol=1e-5)


def test_queries_are_seen_as_rotary_positions_left_them(tmp_path):
    task = make_task(save_tiny_model(tmp_path))

    seen = probed(task, task.block)

    hidden = task.block.input_layernorm(task.full_inputs[:2])
    linear = task.block.self_attn.q_proj(hidden).view(2, -1, 4, 16).transpose(1, 2)
    # the first position is not turned, every later one is, by a rotation that keeps lengths
    torch.testing.assert_close(seen.query[:, :, 0], linear[:, :, 0])
    assert not torch.allclose(seen.query[:, :, 1], linear[:, :, 1])
    torch.testing.assert_close(seen.query.norm(dim=-1), linear.norm(dim=-1))
    assert seen.scale == 1 / math.sqrt(16)


def test_equal_blocks_have_equal_maps(tmp_path):
    task = make_task(save_tiny_model(tmp_path))
    probe = AttentionProbe()
    with probe:
        task.call.run(task.block, task.full_inputs[:2])

    assert float(AttentionTeacher(task).divergence(probe, task.full_inputs[:2])) == 0


def test_the_maps_of_a_student_lead_its_queries_and_keys(tmp_path):
    task = make_task(save_tiny_model(tmp_path))
    student = make_student(task, make_spec(w_bits=2))
    student.trains(on=True)
    for twin in student.twins.values():
        twin.offset = torch.nn.Parameter(torch.zeros_like(twin.weight))
    probe = AttentionProbe()
    with probe:
        task.call.run(student.block, task.inputs[:2])

    divergence = AttentionTeacher(task).divergence(probe, task.full_inputs[:2])
    divergence.backward()

    assert divergence.item() > 0
    reached = {name for name, each in student.twins.items() if each.offset.grad is not None}
    assert reached == {"self_attn.q_proj", "self_attn.k_proj"}


def test_the_divergence_of_maps_changes_what_is_learned(tmp_path):
    folder = save_tiny_model(tmp_path)
    learned = []
    for part in (0.0, 10.0):
        ingredients = Ingredients(attention_loss=part)
        spec = make_spec(w_bits=2, recipe=Recipe.LWC, ingredients=ingredients)
        task = make_task(folder)
        learned.append(learn_block(task, spec, method_of(spec), QUIET).layers)

    scales = [each["self_attn.q_proj"].weight_scale for each in learned]
    assert not torch.equal(*scales)


@pytest.mark.parametrize("model_type", SDPA)
def test_rounded_queries_are_what_attention_is_given(tmp_path, model_type):
    task = make_task(save_tiny_model(tmp_path, model_type))
    plain = probed(task, task.block).query

    round_queries(task.block, 3)

    found = probed(task, task.block).query
    assert torch.equal(found, round_activations(plain, 3))
    assert not torch.equal(found, plain)


def test_rounded_queries_pass_gradients_through(tmp_path):
    task = make_task(save_tiny_model(tmp_path))
    weight = task.block.self_attn.q_proj.weight.requires_grad_()
    round_queries(task.block, 4)

    task.call.run(task.block, task.inputs).square().sum().backward()

    assert bool(weight.grad.abs().sum() > 0)


def test_sixteen_bits_leave_queries_as_they_are(tmp_path):
    task = make_task(save_tiny_model(tmp_path))
    plain = task.call.run(task.block, task.inputs)

    round_queries(task.block, FULL_BITS)

    assert torch.equal(task.call.run(task.block, task.inputs), plain)


def test_a_layer_that_fails_leaves_attention_elsewhere_alone(tmp_path):
    task = make_task(save_tiny_model(tmp_path))
    round_queries(task.block, 2)
    query = torch.randn(1, 2, 4, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(query, query, query)

    with pytest.raises(RuntimeError):
        task.call.run(task.block, torch.zeros(1, 24, 63))

    after = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch.equal(after, plain)


def test_calibration_measures_with_rounded_queries_and_the_teacher_without(tmp_path):
    folder = save_tiny_model(tmp_path)
    spec = make_spec(w_bits=8, a_bits=16, q_bits=2, recipe=Recipe.RTN)
    fine = make_spec(w_bits=8, a_bits=16, recipe=Recipe.RTN)
    first, second = make_task(folder), make_task(folder)

    coarse = learn_block(first, spec, method_of(spec), QUIET)
    exact = learn_block(second, fine, method_of(fine), QUIET)

    assert coarse.loss_after > 2 * exact.loss_after
    # the block that is left behind runs as its checkpoint will
    outputs = run_windows(first.block, first.call, first.inputs, 16)
    error = float(((outputs - first.wanted).square() * first.token_weight).mean())
    assert error == pytest.approx(coarse.loss_after, rel=1e-5)


@torch.no_grad()
def chained_logits(loaded):
    model = ResidentModel(architecture=loaded.architecture, skeleton=loaded.model)
    inputs = capture_inputs(model, TOKENS)
    hidden = inputs.hidden
    for index, call in enumerate(inputs.calls):
        hidden = run_windows(model.load_block(index), call, hidden, loaded.spec.kv_bits)
    return model.load_head()(hidden)


@pytest.mark.parametrize("model_type", ["llama", "falcon-7b", "opt", "gemma3_text"])
def test_a_loaded_checkpoint_rounds_its_queries_whole_and_block_by_block(tmp_path, model_type):
    _, directory, _ = save_checkpoint(tmp_path, COARSE, model_type)
    _, fine, _ = save_checkpoint(tmp_path / "fine", "w8a8kv8", model_type)
    loaded = load_checkpoint(directory)

    with torch.no_grad():
        whole = loaded.model(TOKENS, past_key_values=make_cache(2, 8)).logits
        exact = load_checkpoint(fine).model(TOKENS, past_key_values=make_cache(2, 8)).logits

    # sums over several windows in another order may move a rounded value to its neighbour
    error = (chained_logits(loaded) - whole).square().mean()
    assert float(error) < 0.05 * float((exact - whole).square().mean())


def test_a_family_that_computes_attention_by_itself_says_so(tmp_path):
    architecture = check_config(read_config(save_tiny_model(tmp_path, "gemma2")))
    asked = QuantSpec(w_bits=4, ingredients=Ingredients(attention_loss=1.0))

    for spec, field in ((COARSE, "q_bits"), (asked, "ingredients.attention_loss")):
        with pytest.raises(SpecError, match="outside sdpa") as refused:
            check_spec(architecture, spec)
        assert field in str(refused.value)
