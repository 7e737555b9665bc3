"""The decoder over pages against the transformers model of the same checkpoint, on a CPU."""

from dataclasses import replace

import pytest
import torch

from engine.checkpoint.reader import load_checkpoint
from engine.inference.decoder import Decoder
from engine.inference.decoder.feed_forward import Experts
from engine.inference.decoder.operands import PlainSource
from engine.inference.kv_cache import make_cache
from engine.rotation import Rotation
from engine.spec import LayerOverride, QuantSpec
from tests.tiny_models import FAMILIES, SLIDING_WINDOW, save_tiny_model
from tests.unit.engine.paged_text import (
    TOKENS,
    Sequence,
    advance,
    batch_of,
    load_rotated,
    logits_in_chunks,
)
from tests.unit.engine.quantized_models import save_checkpoint

FLIPPED = 0.05
"""Logits have a spread near 1. An input at the border of two codes may take the other one where
sums of float32 have another order; one code of 255 moves a logit by less than this."""


def logits_of(loaded, ids=TOKENS):
    """What the transformers model gives, over the whole text at once."""
    cache = make_cache(loaded.architecture.layers, loaded.spec.kv_bits)
    with torch.inference_mode():
        return loaded.model(ids[None], past_key_values=cache).logits[0]


def saved(tmp_path, spec, family="llama", **fields):
    return save_checkpoint(tmp_path, spec, family, **fields)[1]


def decoder_of(directory, head_bits=None):
    return Decoder.from_loaded(load_checkpoint(directory, prepares=False), head_bits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("notation", ["w8a16", "w4a8kv8"])
def test_every_family_gives_the_logits_of_its_model(tmp_path, family, notation):
    directory = saved(tmp_path, notation, family)
    loaded = load_checkpoint(directory)
    assert len(TOKENS) > 2 * SLIDING_WINDOW

    found = logits_in_chunks(decoder_of(directory), kv_bits=loaded.spec.kv_bits)

    expected = logits_of(loaded)
    bound = 1e-3 * float(expected.abs().max()) if notation == "w8a16" else FLIPPED
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("spec", [
    QuantSpec.from_notation("w2*a8g32kv4"),
    QuantSpec(w_bits=2, a_bits=8, half_step=True, kv_bits=2),
    QuantSpec(w_bits=4, a_bits=4, q_bits=4),
    QuantSpec(w_bits=8, a_bits=8, overrides=(
        LayerOverride(pattern="*.k_proj", w_bits=2),
        LayerOverride(pattern="*.up_proj", a_bits=4),
        LayerOverride(pattern="*.v_proj", w_bits=16),
    )),
])  # fmt: skip
def test_every_grid_gives_the_logits_of_its_model(tmp_path, spec):
    directory = saved(tmp_path, spec)

    found = logits_in_chunks(decoder_of(directory), kv_bits=spec.kv_bits)

    torch.testing.assert_close(found, logits_of(load_checkpoint(directory)), rtol=0, atol=FLIPPED)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_sequences_of_a_mixed_batch_get_what_they_get_alone(tmp_path, family):
    decoder = decoder_of(saved(tmp_path, "w4a8kv8", family))
    texts = [TOKENS, TOKENS.flip(0), TOKENS.roll(7), TOKENS.roll(13)]
    alone = [logits_in_chunks(decoder, kv_bits=8, ids=ids) for ids in texts]
    pages = decoder.new_pages(12, kv_bits=8)
    one, two, three, four = (
        Sequence(ids=ids, pages=(3 * number, 3 * number + 2, 3 * number + 1))
        for number, ids in enumerate(texts)
    )

    advance(decoder, pages, [(one, 5), (two, 17)])
    advance(decoder, pages, [(two, 1), (one, 1), (three, 21)])
    advance(decoder, pages, [(three, 1), (two, 1), (four, 3), (one, 11)])
    advance(decoder, pages, [(one, 1), (two, 1), (three, 1), (four, 1)])

    for sequence, expected in zip((one, two, three, four), alone, strict=True):
        found = torch.cat(sequence.logits)
        torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=1e-4)


def test_a_row_that_only_pads_changes_nothing_and_stores_nothing(tmp_path):
    decoder = decoder_of(saved(tmp_path, "w4a8kv8"))
    pages = decoder.new_pages(4, kv_bits=8)
    sequence = Sequence(ids=TOKENS, pages=(1, 2))
    batch = batch_of([(sequence, 1)])
    expected = decoder.forward(batch, pages)
    stored = [each.codes.clone() for each in pages]
    padded = replace(
        batch,
        token_ids=batch.token_ids.repeat(3),
        positions=batch.positions.repeat(3),
        kv_slots=torch.tensor([int(batch.kv_slots), -1, -1]),
        block_table=batch.block_table.repeat(3, 1),
        lengths=torch.tensor([1, 0, 0], dtype=torch.int32),
        decodes=3,
    )

    found = decoder.forward(padded, pages)

    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=1e-5)
    assert all(torch.equal(each.codes, kept) for each, kept in zip(pages, stored, strict=True))


def test_logits_are_given_for_the_rows_that_want_them(tmp_path):
    decoder = decoder_of(saved(tmp_path, "w4a8"))
    pages = decoder.new_pages(4, kv_bits=16)
    steps = [(Sequence(ids=TOKENS, pages=(1, 2)), 7)]
    rows = torch.tensor([6, 2])

    found = decoder.forward(batch_of(steps, logit_rows=rows), pages)

    expected = decoder.forward(batch_of(steps), pages)
    torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "a_bits"), [("llama", 8), ("qwen3", 4), ("mixtral", 8)])
def test_a_rotated_checkpoint_gives_the_logits_of_its_model(tmp_path, family, a_bits, tied):
    source = save_tiny_model(tmp_path, family, tie_word_embeddings=tied)
    spec = QuantSpec(w_bits=4, a_bits=a_bits, kv_bits=8)
    rotation = Rotation(seed=5, online_hadamard=True)
    expected = logits_of(load_rotated(source, spec, rotation))

    decoder = Decoder.from_loaded(load_rotated(source, spec, rotation))

    # of 15 codes, one that flips is worth more
    bound = FLIPPED if a_bits == 8 else 0.3
    torch.testing.assert_close(logits_in_chunks(decoder, kv_bits=8), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("head_bits", "bound"), [(8, 0.1), (4, 0.5)])
def test_a_rounded_head_changes_little(tmp_path, seed, tied, head_bits, bound):
    source = save_tiny_model(tmp_path, tie_word_embeddings=tied)
    spec, rotation = QuantSpec(w_bits=8, a_bits=16), Rotation(seed=seed, online_hadamard=False)
    expected = logits_of(load_rotated(source, spec, rotation))

    decoder = Decoder.from_loaded(load_rotated(source, spec, rotation), head_bits)

    found = logits_in_chunks(decoder, kv_bits=16)
    assert 1e-4 < float((found - expected).abs().max()) < bound
    assert float((found - expected).std()) < bound / 4


def test_a_rounded_head_that_was_tied_is_counted_beside_the_embedding(tmp_path):
    directory = saved(tmp_path, "w4a8", tie_word_embeddings=True)

    kept, eight, four = (decoder_of(directory, bits).weight_bytes for bits in (None, 8, 4))

    assert kept < min(eight, four)


@pytest.mark.parametrize("head_bits", [2, 16])
def test_other_bits_of_a_head_are_refused(tmp_path, head_bits):
    loaded = load_checkpoint(saved(tmp_path, "w4a8"))

    with pytest.raises(ValueError, match=f"head_bits = {head_bits}: use one of"):
        Decoder.from_loaded(loaded, head_bits)


def test_the_loaded_model_keeps_no_layer(tmp_path):
    loaded = load_checkpoint(saved(tmp_path, "w2a8"))

    decoder = Decoder.from_loaded(loaded)

    names = [name for name, _ in (*loaded.model.named_parameters(), *loaded.model.named_buffers())]
    assert names == [name for name in names if ".layers." not in name]
    assert decoder.weight_bytes < 260 * 64 * 4 * 2 + 2 * 45_000


def test_fewer_positions_shorten_the_context(tmp_path):
    loaded = load_checkpoint(saved(tmp_path, "w4a8"))

    assert Decoder.from_loaded(loaded, positions=64).context_length == 64


def test_experts_run_everywhere_give_what_they_give_where_they_are_chosen(tmp_path):
    decoder = decoder_of(saved(tmp_path, "w4a8", "mixtral"))
    layer, device = decoder._layers[0], decoder._placed  # noqa: SLF001  # only a GPU takes the first
    experts, x = layer.feed_forward, torch.randn(9, 64)
    assert isinstance(experts, Experts)
    with torch.inference_mode():
        _, weights, chosen = experts.router(x)
        source = PlainSource(device.passes, x)

        everywhere = experts._everywhere(device, source, None, weights, chosen)  # noqa: SLF001  # as above

        found = experts._where_chosen(device, x, None, weights, chosen)  # noqa: SLF001  # as above
    torch.testing.assert_close(everywhere, found, rtol=0, atol=1e-5)
