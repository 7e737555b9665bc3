"""Layers whose scales learn, and the divergence that they learn by."""

import pytest
import torch
from torch import nn

from engine.methods import distillation
from engine.methods.distillation import logit_divergence
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.tuned import TunedLinear
from engine.spec import QuantSpec

SPECS = {
    "per channel": QuantSpec(w_bits=4, a_bits=8),
    "groups": QuantSpec(w_bits=3, a_bits=8, group_size=32),
    "half step": QuantSpec(w_bits=2, a_bits=8, group_size=32, half_step=True),
    "one bit": QuantSpec(w_bits=1, a_bits=16, half_step=True),
    "bit balance": QuantSpec(w_bits=2, a_bits=8, bit_balance=True, symmetric=True),
    "eight bits": QuantSpec(w_bits=8, a_bits=8, group_size=32),
    "symmetric": QuantSpec(w_bits=4, a_bits=8, symmetric=True),
    "full inputs": QuantSpec(w_bits=4, a_bits=16, group_size=32),
}


@pytest.fixture(params=[(name, block) for name in SPECS for block in (0, 32)], ids=str)
def layer(request):
    name, block = request.param
    spec = SPECS[name]
    torch.manual_seed(4)
    twin = FakeQuantLinear(nn.Linear(96, 20), spec.weight_grid("any"), spec.a_bits, block)
    return twin.to_quant_linear().prepare()


@pytest.fixture
def x():
    return torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(5))


def test_at_the_start_a_tuned_layer_is_the_quantized_one(layer, x):
    torch.testing.assert_close(TunedLinear(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_the_scale_of_a_layer_that_learned_nothing_is_the_stored_one(layer):
    assert torch.equal(TunedLinear(layer).learned_scale(), layer.weight_scale)


def test_codes_start_from_the_weights_and_stay_until_they_are_trained(x):
    spec = SPECS["half step"]
    torch.manual_seed(4)
    twin = FakeQuantLinear(nn.Linear(96, 20), spec.weight_grid("any"), spec.a_bits)
    layer = twin.to_quant_linear(keeps_remainder=True).prepare()
    tuned = TunedLinear(layer, trains_codes=True)

    moved = (twin.weight - layer.dequantized()) / layer.weight_scale.float().repeat_interleave(
        32, dim=1
    )

    # the fp16 scale clips the outermost weights a little
    torch.testing.assert_close(tuned.offset.detach(), moved.clamp(-0.49, 0.49), atol=1e-3, rtol=0)
    assert tuned.offset.detach().abs().mean() > 0.1
    torch.testing.assert_close(tuned(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(tuned.learned_parts()["weight_packed"], layer.weight_packed)


def test_a_step_changes_the_codes_of_weights_near_an_edge_alone():
    spec = SPECS["groups"]
    torch.manual_seed(4)
    twin = FakeQuantLinear(nn.Linear(96, 20), spec.weight_grid("any"), spec.a_bits)
    layer = twin.to_quant_linear(keeps_remainder=True)
    tuned = TunedLinear(layer, trains_codes=True)
    near = (tuned.offset.detach() > 0.45) & (layer.codes() < layer.grid.max_code)

    tuned.offset.data += 0.05

    layer.weight_packed = tuned.learned_parts()["weight_packed"]
    changed = layer.codes() != twin.codes()
    assert near.any()
    assert torch.equal(changed, near)


def test_a_learned_scale_is_what_is_stored_and_run(layer, x):
    tuned = TunedLinear(layer)
    generator = torch.Generator().manual_seed(6)
    tuned.gain.data = 0.2 * torch.randn(tuned.gain.shape, generator=generator)
    out = tuned(x)

    layer.weight_scale = tuned.learned_scale()

    # stored in 11 bits
    torch.testing.assert_close(layer.prepare()(x), out, rtol=1e-3, atol=5e-3)


def test_every_gain_gets_a_gradient(layer, x):
    tuned = TunedLinear(layer)

    tuned(x).square().sum().backward()

    assert bool((tuned.gain.grad != 0).all())


def test_codes_that_learned_nothing_are_the_stored_ones(layer, x):
    tuned = TunedLinear(layer, trains_codes=True)

    parts = tuned.learned_parts()

    assert torch.equal(parts["weight_packed"], layer.weight_packed)
    assert torch.equal(parts["weight_scale"], layer.weight_scale)
    assert torch.equal(tuned(x), TunedLinear(layer)(x))


def test_learned_codes_are_what_is_stored_and_run(layer, x):
    tuned = TunedLinear(layer, trains_codes=True)
    generator = torch.Generator().manual_seed(6)
    tuned.offset.data = torch.randn(tuned.offset.shape, generator=generator)
    out, before = tuned(x), layer.codes()

    layer.weight_packed = tuned.learned_parts()["weight_packed"]

    wanted = (before.int() + torch.round(tuned.offset.data).int()).clamp(0, layer.grid.max_code)
    assert torch.equal(layer.codes().int(), wanted)
    torch.testing.assert_close(layer.prepare()(x), out, rtol=1e-5, atol=1e-5)


def test_codes_and_gains_learn_together(layer, x):
    tuned = TunedLinear(layer, trains_codes=True)

    tuned(x).square().sum().backward()

    assert bool((tuned.gain.grad != 0).all())
    assert bool((tuned.offset.grad != 0).any(1).all())


@pytest.fixture
def hidden():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 9, 16, generator=generator) for _ in range(2)]


@pytest.fixture
def head():
    torch.manual_seed(8)
    return nn.Linear(16, 50).requires_grad_(requires_grad=False)


def test_the_divergence_is_that_of_all_distributions(hidden, head, monkeypatch):
    seen, wanted = hidden
    p, q = (torch.softmax(head(each).double(), -1) for each in (wanted, seen))
    expected = float((p * (p / q).log()).sum(-1).mean())

    whole = float(logit_divergence(seen, wanted, head))
    monkeypatch.setattr(distillation, "CHUNK", 4)

    assert whole == pytest.approx(expected, rel=1e-4)
    assert float(logit_divergence(seen, wanted, head)) == pytest.approx(expected, rel=1e-4)


def test_equal_states_do_not_diverge(hidden, head):
    assert float(logit_divergence(hidden[0], hidden[0], head)) == pytest.approx(0, abs=1e-6)


def test_the_gradient_leads_to_the_wanted_logits(hidden, head):
    seen = hidden[0].clone().requires_grad_()
    before = logit_divergence(seen, hidden[1], head)

    before.backward()

    after = logit_divergence(seen.detach() - seen.grad, hidden[1], head)
    assert float(after) < before.item()
