import dataclasses
import math

import pytest
import torch

from engine.calibration.block import BlockShape, BlockTask, run_windows
from engine.calibration.capture import capture_inputs
from engine.calibration.learn import learn_block
from engine.calibration.statistics import channel_statistics
from engine.calibration.watch import Watch
from engine.errors import CalibrationDiverged, CalibrationInterrupted
from engine.events import Progress
from engine.methods.losses import token_weights
from engine.methods.recipes import method_of
from engine.models.loading import SourceModel
from engine.modules.linear import QuantLinear
from engine.modules.swap import named_linears, quant_linears
from engine.spec import FULL_BITS, CalibrationSpec, LayerOverride, QuantSpec, Recipe
from tests.tiny_models import save_tiny_model

TOKENS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
QUIET = Watch(on_event=lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def task(folder):
    source = SourceModel.open(folder)
    inputs = capture_inputs(source, TOKENS)
    block = source.load_block(0)
    wanted = run_windows(block, inputs.calls[0], inputs.hidden, FULL_BITS)
    return BlockTask(
        index=0,
        total=2,
        name="model.layers.0",
        block=block,
        call=inputs.calls[0],
        shape=BlockShape.of(source.architecture, {}),
        inputs=inputs.hidden + 0.01,
        full_inputs=inputs.hidden,
        wanted=wanted,
        token_weight=token_weights(wanted),
    )


def spec_of(epochs=3, recipe=Recipe.LWC, **fields):
    calibration = CalibrationSpec(samples=4, length=32, epochs=epochs, batch=1)
    return QuantSpec(**{"w_bits": 3, "a_bits": 8, **fields}, recipe=recipe, calibration=calibration)


def learn(task, spec, watch=QUIET):
    return learn_block(task, spec, method_of(spec), watch)


def mean_square_error(outputs, task):
    return float(((outputs - task.wanted).square() * task.token_weight).mean())


def test_learning_beats_plain_rounding(task):
    learned = learn(task, spec_of())

    assert learned.loss_after < 0.9 * learned.loss_before


def test_the_losses_are_those_of_the_block_that_is_kept(task):
    learned = learn(task, spec_of())

    outputs = run_windows(task.block, task.call, task.inputs, FULL_BITS)
    assert learned.loss_after == pytest.approx(mean_square_error(outputs, task), rel=1e-5)


@pytest.mark.parametrize("spec", [spec_of(recipe=Recipe.RTN), spec_of(epochs=0)])
def test_without_steps_the_result_is_plain_rounding(task, spec):
    original = {name: each.weight.clone() for name, each in named_linears(task.block).items()}

    learned = learn(task, spec)

    assert learned.loss_after == learned.loss_before
    for name, layer in learned.layers.items():
        steps = ((layer.dequantized() - original[name]) / layer.weight_scale.float()).abs()
        # the scale is rounded to 11 bits, so the last code may miss by that much of the range
        assert steps.max() <= 0.5 + 8 * 2**-11


def test_a_result_that_is_worse_than_plain_rounding_is_not_kept(task):
    spec = spec_of(epochs=1)
    ruinous = dataclasses.replace(method_of(spec), clipping_rate=100.0)

    learned = learn_block(task, spec, ruinous, QUIET)

    assert learned.loss_after <= learned.loss_before


def test_every_linear_is_replaced_by_its_quantized_form(task):
    learned = learn(task, spec_of(epochs=0))

    assert len(learned.layers) == 7
    assert quant_linears(task.block) == learned.layers
    assert {each.grid.bits for each in learned.layers.values()} == {3}


def test_an_override_leaves_a_layer_in_full_precision(task):
    kept = LayerOverride(pattern="*.0.mlp.down_proj", w_bits=16)

    learned = learn(task, spec_of(epochs=1, overrides=(kept,)))

    assert "mlp.down_proj" not in learned.layers
    assert not isinstance(task.block.mlp.down_proj, QuantLinear)


def test_equal_seeds_learn_equal_bits(folder, task):
    first = learn(task, spec_of())
    block = SourceModel.open(folder).load_block(0)
    again = learn(dataclasses.replace(task, block=block), spec_of())

    for name, layer in first.layers.items():
        assert torch.equal(layer.weight_packed, again.layers[name].weight_packed)
        assert torch.equal(layer.weight_scale, again.layers[name].weight_scale)


def test_coarse_keys_and_values_are_part_of_what_is_learned(folder, task):
    fine = learn(task, spec_of(epochs=0))
    block = SourceModel.open(folder).load_block(0)
    coarse = learn(dataclasses.replace(task, block=block), spec_of(epochs=0, kv_bits=2))

    assert coarse.loss_before > fine.loss_before


def test_a_weight_that_is_not_finite_is_named(task):
    task.block.mlp.up_proj.weight[3, 4] = math.inf

    with pytest.raises(CalibrationDiverged) as diverged:
        learn(task, spec_of())

    assert diverged.value.layer == "model.layers.0.mlp.up_proj"


def test_a_teacher_that_is_not_finite_names_the_block(task):
    task.wanted[1, 2, 3] = math.nan

    with pytest.raises(CalibrationDiverged, match=r"model\.layers\.0"):
        learn(task, spec_of())


def test_a_loss_that_is_not_finite_names_the_block(task):
    task.inputs[0] = 1e30

    with pytest.raises(CalibrationDiverged) as diverged:
        learn(task, spec_of())

    assert diverged.value.layer == "model.layers.0"


def test_a_stop_is_heard_at_the_next_step(task):
    answers = iter([False, False, True])

    with pytest.raises(CalibrationInterrupted):
        learn(task, spec_of(), Watch(on_event=lambda _: None, should_stop=lambda: next(answers)))

    assert next(answers, None) is None


def test_progress_counts_steps_over_all_blocks(task):
    events = []

    learn(dataclasses.replace(task, index=1), spec_of(), Watch(on_event=events.append))

    last = [each for each in events if isinstance(each, Progress)][-1]
    assert (last.done, last.total) == (2 * 12, 2 * 12)


def test_input_power_is_the_mean_square_of_what_a_linear_sees(task):
    found = channel_statistics(task.block, task.call, task.inputs)

    seen = task.block.input_layernorm(task.inputs).square().mean((0, 1))
    torch.testing.assert_close(found["self_attn.q_proj"].power, seen)
    assert found["mlp.down_proj"].low.shape == (128,)
    assert not task.block.self_attn.q_proj._forward_pre_hooks  # noqa: SLF001  nothing is left behind
