"""The tables of the families, checked against the layers that they describe."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from engine.architecture import check_config
from engine.families import base, llama
from engine.families.base import NormKind
from engine.families.registry import FAMILIES as TABLES
from engine.models.loading import read_config
from tests.moved_factors import (
    channels_of,
    divide_producer,
    draw_factor,
    draw_query_key_factor,
    draw_shift,
    make_tiny_layer,
    move_query_key,
    multiply_consumers,
)
from tests.tiny_models import FAMILIES, TINY, save_tiny_model

GATED = ("qkv", "out", "fc1", "fc2")
PAIRS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "phi3-long"), GATED
    ),
    "opt": ("out", "qkv", "fc1", "fc2"),
    "opt-350m": ("out",),
    "falcon-7b": ("qkv", "out"),
    "falcon-40b": ("qkv", "fc1", "out"),
    "falcon-11b": ("qkv", "out"),
    "falcon-rw": ("qkv", "fc1", "out"),
    "mixtral": ("qkv", "out", "fc1", "fc2.0", "fc2.1", "fc2.2", "fc2.3"),
}
WITH_BIASES = {
    "llama-biased": ("llama", {}),
    "opt": ("opt", {}),
    "opt-350m": ("opt-350m", {}),
    "falcon-rw": ("falcon-rw", {}),
    "falcon-7b-biased": ("falcon-7b", {"bias": True}),
    "falcon-40b-biased": ("falcon-40b", {"bias": True}),
    "gemma2-biased": ("gemma2", {"attention_bias": True}),
}


def assert_unchanged(layer, block, wanted):
    torch.testing.assert_close(layer.run(block), wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=FAMILIES)
def layer(request, tmp_path):
    return make_tiny_layer(tmp_path, request.param)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_layer_has_its_pairs(tmp_path, model_type):
    architecture = check_config(read_config(save_tiny_model(tmp_path, model_type)))

    assert tuple(each.name for each in architecture.pairs) == PAIRS[model_type]


def test_a_factor_moves_along_every_pair_without_changing_the_layer(layer):
    wanted, norm = layer.run(layer.load()), layer.architecture.family.norm

    for pair in layer.architecture.pairs:
        block = layer.load()
        factor = draw_factor(channels_of(block, pair), signs=not pair.positive)
        divide_producer(block, pair, norm, factor)
        # what makes the equality below worth something
        assert (layer.run(block) - wanted).abs().max() > 1e-3, pair.name
        multiply_consumers(block, pair, factor)

        assert_unchanged(layer, block, wanted)


def test_all_factors_move_at_once(layer):
    wanted, norm = layer.run(layer.load()), layer.architecture.family.norm
    block = layer.load()

    for pair in layer.architecture.pairs:
        factor = draw_factor(channels_of(block, pair))
        divide_producer(block, pair, norm, factor)
        multiply_consumers(block, pair, factor)
    pair = layer.architecture.query_key
    move_query_key(block, pair, norm, draw_query_key_factor(pair))

    assert_unchanged(layer, block, wanted)


def test_a_factor_moves_from_queries_to_keys(layer):
    pair, norm = layer.architecture.query_key, layer.architecture.family.norm
    wanted, block = layer.run(layer.load()), layer.load()

    move_query_key(block, pair, norm, draw_query_key_factor(pair))

    assert_unchanged(layer, block, wanted)
    assert any(
        not torch.equal(each, plain)
        for each, plain in zip(block.parameters(), layer.load().parameters(), strict=True)
    )


def test_channels_that_turn_together_need_one_factor(layer):
    pair, norm = layer.architecture.query_key, layer.architecture.family.norm
    wanted, block = layer.run(layer.load()), layer.load()
    factor = draw_query_key_factor(pair)
    factor[:, : pair.rotary_dim // 2] *= 3

    move_query_key(block, pair, norm, factor)

    changed = (layer.run(block) - wanted).abs().max() > 1e-3
    assert changed == (pair.rotary_dim > 0)


@pytest.mark.parametrize("name", WITH_BIASES)
def test_a_constant_moves_where_the_table_says_so(tmp_path, name):
    model_type, fields = WITH_BIASES[name]
    layer = make_tiny_layer(tmp_path, model_type, **fields)
    wanted, norm = layer.run(layer.load()), layer.architecture.family.norm
    pairs = [each for each in layer.architecture.pairs if each.shifts]

    assert pairs
    for pair in pairs:
        block = layer.load()
        count = channels_of(block, pair)
        divide_producer(block, pair, norm, draw_factor(count), draw_shift(count))
        multiply_consumers(block, pair, draw_factor(count), draw_shift(count))

        assert_unchanged(layer, block, wanted)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_constant_moves_where_a_bias_is_missing(tmp_path, model_type):
    architecture = check_config(read_config(save_tiny_model(tmp_path, model_type)))
    biased = {
        each.name.removeprefix(f"{architecture.layer_name(0)}.")
        for each in architecture.linears_per_layer
        if each.has_bias
    }
    if architecture.family.norm is NormKind.LAYER:
        biased |= {
            name.removesuffix(".bias")
            for name in architecture.family.layer_tensors(architecture.sizes, architecture.fields)
            if name.endswith(".bias")
        }

    for pair in architecture.pairs:
        if pair.shifts:
            assert {pair.producer, *pair.consumers} <= biased


def test_a_negative_factor_does_not_pass_a_relu(tmp_path):
    layer = make_tiny_layer(tmp_path, "opt")
    wanted, block = layer.run(layer.load()), layer.load()
    [pair] = [each for each in layer.architecture.pairs if each.positive]
    factor = draw_factor(channels_of(block, pair), signs=True)

    divide_producer(block, pair, NormKind.LAYER, factor)
    multiply_consumers(block, pair, factor)

    assert pair.name == "fc2"
    assert (layer.run(block) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", FAMILIES)
def test_pairs_and_writers_name_linears_of_the_layer(tmp_path, model_type):
    architecture = check_config(read_config(save_tiny_model(tmp_path, model_type)))
    names = [
        each.name.removeprefix(f"{architecture.layer_name(0)}.")
        for each in architecture.linears_per_layer
    ]

    assert len(names) == TINY[model_type].linears
    for pair in architecture.pairs:
        assert set(pair.consumers) <= set(names)
    for pattern in architecture.family.residual_writers:
        assert any(fnmatchcase(name, pattern) for name in names)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_streams_between_plain_rms_norms_rotate(tmp_path, model_type):
    architecture = check_config(read_config(save_tiny_model(tmp_path, model_type)))

    norms = [each.kind == "norm" for each in architecture.pairs]
    assert architecture.family.rotates == (
        architecture.family.norm is NormKind.RMS and sum(norms) == 2
    )


def test_every_table_is_tested():
    assert {each.config_class.model_type for each in TINY.values()} == set(TABLES)


def test_the_documented_example_is_the_table_of_a_llama(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "engine.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(EXAMPLE = .*?)```", text, flags=re.DOTALL)
    names = {**vars(base), **vars(llama)}
    exec(example, names)  # noqa: S102  our own documentation

    folder = save_tiny_model(tmp_path, "llama", attention_bias=False, mlp_bias=False)
    architecture = check_config(read_config(folder))
    sizes, fields, family = architecture.sizes, architecture.fields, names["EXAMPLE"]
    assert example.count("\n") < 30
    assert family.linears(sizes, fields) == architecture.family.linears(sizes, fields)
    assert family.pairs(sizes, fields) == architecture.pairs
    assert family.query_key(sizes, fields) == architecture.query_key
