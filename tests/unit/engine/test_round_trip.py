"""A reloaded checkpoint computes what the fake-quantized model computed."""

import pytest
import torch

from engine.checkpoint.reader import load_checkpoint
from engine.inference.kv_cache import make_cache
from engine.modules.swap import quant_linears
from engine.spec import LayerOverride, QuantSpec
from tests.tiny_models import FAMILIES, TINY
from tests.unit.engine.quantized_models import save_checkpoint

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
NOTATIONS = [
    "w4a8", "w3a8", "w4a16", "w2*a8", "w2*a16", "w4a8g64", "w4a8g32", "w3a16g32", "w5a6", "w8a8",
    "w1a16g32", "w4a8kv8", "w3a8g32kv4",
]  # fmt: skip


def logits_of(model, kv_bits):
    cache = make_cache(model.config.num_hidden_layers, kv_bits)
    with torch.inference_mode():
        return model(TOKENS, past_key_values=cache).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("notation", NOTATIONS)
def test_logits_after_reloading_equal_those_before(tmp_path, notation, family):
    twin, directory, _ = save_checkpoint(tmp_path, notation, family)
    kv_bits = QuantSpec.from_notation(notation).kv_bits
    expected = logits_of(twin, kv_bits)

    loaded = load_checkpoint(directory)

    actual = logits_of(loaded.model, kv_bits)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
    # both forms multiply the same integers, so there is nothing to tolerate
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads(tmp_path, family):
    twin, directory, _ = save_checkpoint(tmp_path, "w4a8kv8", family)

    loaded = load_checkpoint(directory)

    assert torch.equal(logits_of(loaded.model, 8), logits_of(twin, 8))
    assert len(quant_linears(loaded.model)) == 2 * TINY[family].linears


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_on_sixteen_bit_activations(tmp_path, family):
    _, directory, _ = save_checkpoint(tmp_path, "w8a8kv8", family)
    exact = logits_of(load_checkpoint(directory).model, 8)

    coarse = logits_of(load_checkpoint(directory, dtype=torch.bfloat16).model, 8)

    assert coarse.dtype is torch.bfloat16
    assert (coarse.float() - exact).square().mean() < 0.05 * exact.square().mean()


def test_overrides_reload_and_full_precision_layers_stay_plain(tmp_path):
    spec = QuantSpec(
        w_bits=3,
        a_bits=8,
        overrides=(
            LayerOverride(pattern="*.down_proj", w_bits=16),
            LayerOverride(pattern="*.0.self_attn.*", w_bits=6, a_bits=16, group_size=32),
        ),
    )
    twin, directory, _ = save_checkpoint(tmp_path, spec)

    loaded = load_checkpoint(directory)

    assert torch.equal(logits_of(loaded.model, 16), logits_of(twin, 16))
    layers = quant_linears(loaded.model)
    assert layers["model.layers.0.self_attn.q_proj"].grid.planes == 6
    assert layers["model.layers.1.self_attn.q_proj"].grid.planes == 3
    assert "model.layers.0.mlp.down_proj" not in layers


def test_quantized_logits_differ_from_full_precision(tmp_path):
    # what makes the equalities above worth something
    coarse, _, _ = save_checkpoint(tmp_path / "coarse", "w2a8")
    fine, _, _ = save_checkpoint(tmp_path / "fine", "w8a16")

    assert (logits_of(coarse, 16) - logits_of(fine, 16)).abs().max() > 0.1


@pytest.mark.parametrize(("notation", "tolerance"), [("w4a16", 1e-4), ("w4a8kv8", 0.1)])
def test_a_prompt_in_parts_gives_the_logits_of_the_whole(tmp_path, notation, tolerance):
    _, directory, _ = save_checkpoint(tmp_path, notation)
    loaded = load_checkpoint(directory)
    cache = make_cache(2, loaded.spec.kv_bits)

    with torch.inference_mode():
        parts = [
            loaded.model(TOKENS[:, start : start + 8], past_key_values=cache).logits
            for start in range(0, 40, 8)
        ]

    whole = logits_of(loaded.model, loaded.spec.kv_bits)
    # attention adds in another order, which may move a rounded activation by one step
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kv_bits", "tolerance"), [(16, 1e-4), (8, 0.1)])
def test_a_cache_changes_nothing_but_rounding_even_beyond_a_sliding_window(
    tmp_path, family, kv_bits, tolerance
):
    _, directory, _ = save_checkpoint(tmp_path, "w8a16", family)
    model = load_checkpoint(directory).model
    cache = make_cache(2, kv_bits)

    with torch.inference_mode():
        without = model(TOKENS, use_cache=False).logits
        steps = [
            model(TOKENS[:, start : start + 4], past_key_values=cache).logits
            for start in range(0, 40, 4)
        ]

    torch.testing.assert_close(torch.cat(steps, 1), without, rtol=0, atol=tolerance)
