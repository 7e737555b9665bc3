import pytest
import torch
from transformers.cache_utils import DynamicCache

from engine.inference.kv_cache import QuantizedCache, QuantizedStates, make_cache
from kernels.activation_quant import dequantize_activations, quantize_activations


def states(tokens=5, *, batch=2, heads=3, dims=16):
    return torch.randn(batch, heads, tokens, dims)


def test_full_precision_needs_no_codes():
    assert type(make_cache(2, 16)) is DynamicCache


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_token_and_head_is_quantized_over_its_dimensions(bits):
    keys, values = states(), states()

    seen_keys, seen_values = make_cache(1, bits).update(keys, values, 0)

    for seen, given in ((seen_keys, keys), (seen_values, values)):
        rows = quantize_activations(given.reshape(-1, 16), bits)
        assert torch.equal(seen, dequantize_activations(rows).view_as(given))
        assert not torch.equal(seen, given)


def test_tokens_appended_one_by_one_equal_tokens_appended_at_once():
    keys, values = states(), states()
    slow, fast = make_cache(1, 4), make_cache(1, 4)

    for at in range(5):
        seen = slow.update(keys[:, :, at : at + 1], values[:, :, at : at + 1], 0)
    expected = fast.update(keys, values, 0)

    assert torch.equal(seen[0], expected[0])
    assert torch.equal(seen[1], expected[1])
    assert slow.get_seq_length() == fast.get_seq_length() == 5


def test_codes_take_a_byte_and_the_rest_five_bytes_a_token_and_head():
    stored = QuantizedStates.from_states(states(), 8)

    assert stored.codes.nbytes == 2 * 3 * 5 * 16
    assert stored.scale.nbytes + stored.zero_point.nbytes == 2 * 3 * 5 * 5


def test_layers_do_not_mix():
    cache = make_cache(2, 8)
    first, second = states(4), states(4)

    cache.update(first, first, 0)
    seen, _ = cache.update(second, second, 1)

    assert torch.equal(seen, make_cache(1, 8).update(second, second, 0)[0])


def test_masks_cover_what_is_stored_and_what_comes():
    cache = make_cache(1, 8)
    cache.update(states(7), states(7), 0)

    assert cache.get_mask_sizes(3, 0) == (10, 0)


def test_a_reset_cache_is_empty():
    cache = make_cache(1, 8)
    cache.update(states(), states(), 0)

    cache.reset()

    assert cache.get_seq_length() == 0
    assert cache.update(states(2), states(2), 0)[0].shape[2] == 2


def test_sequences_can_change_places():
    cache = make_cache(1, 8)
    keys, _ = cache.update(states(), states(), 0)

    cache.reorder_cache(torch.tensor([1, 0]))
    again, _ = cache.update(states(1), states(1), 0)

    assert torch.equal(again[:, :, :5], keys.flip(0))


def test_the_dtype_of_the_model_is_kept():
    keys = states().to(torch.bfloat16)

    assert make_cache(1, 8).update(keys, keys, 0)[0].dtype == torch.bfloat16


def test_gradients_pass_to_the_tokens_just_appended():
    cache = QuantizedCache(1, 8)
    cache.update(states(3), states(3), 0)
    keys = states(2).requires_grad_()

    seen, _ = cache.update(keys, states(2), 0)
    seen.sum().backward()

    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_a_token_that_is_not_finite_is_seen():
    keys = states()
    keys[0, 0, 2, 0] = float("inf")

    seen, _ = make_cache(1, 8).update(keys, states(), 0)

    assert bool(seen[0, 0, 2].isnan().all())
    assert bool(seen[0, 0, 1].isfinite().all())
