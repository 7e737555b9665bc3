"""A rotated model computes what its source computes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.architecture import check_config
from engine.calibration.capture import capture_inputs
from engine.errors import SpecError, UnsupportedModel
from engine.families.base import ChannelPair, PairKind
from engine.families.registry import FAMILIES as TABLES
from engine.models import rotated as module
from engine.models.blocks import ResidentModel
from engine.models.loading import SourceModel, load_full_precision, read_config
from engine.models.rotated import RotatedModel, install_rotation, rotated
from engine.modules.rotated import ResidualRotation, RotatedEmbedding, UnrotatedNorm
from engine.rotation import Rotation
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_models import save_tiny_model

FAMILIES = [name for name in TINY if name in TABLES and TABLES[name].rotates]
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
ROTATION = Rotation(seed=5, online_hadamard=False)
# heads of 12 channels take a matrix of Paley's, those of 10 and 14 only blocks of two
SIZES = [
    {},
    {"hidden_size": 48, "intermediate_size": 96, "head_dim": 12},
    {"hidden_size": 40, "intermediate_size": 96, "head_dim": 10},
    {"hidden_size": 56, "intermediate_size": 96, "head_dim": 14, "num_key_value_heads": 1},
]


@torch.no_grad()
def logits_of(model, tokens=TOKENS):
    """Run a model block by block."""
    inputs = capture_inputs(model, tokens)
    hidden = inputs.hidden
    for index, call in enumerate(inputs.calls):
        hidden = call.run(model.load_block(index), hidden)
    return model.load_head()(hidden)


def write_whole(source, rotation):
    """Build the model that a checkpoint of the rotated source would load into."""
    whole = copy.deepcopy(load_full_precision(source))
    view = rotated(SourceModel.open(source), rotation)
    for index, block in enumerate(whole.get_submodule("model.layers")):
        block.load_state_dict(view.load_block(index).state_dict(), assign=True)
    install_rotation(whole, check_config(read_config(source)), rotation)
    return whole


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_of_every_family_is_preserved(tmp_path, family, tied):
    source = SourceModel.open(save_tiny_model(tmp_path, family, layers=3, tie_word_embeddings=tied))

    turned = logits_of(rotated(source, ROTATION))

    plain = logits_of(source)
    assert plain.std() > 0.1
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda each: str(each.get("hidden_size", 64)))
def test_the_function_is_preserved_at_sizes_that_are_no_powers_of_two(tmp_path, sizes):
    source = SourceModel.open(save_tiny_model(tmp_path, **sizes))

    turned = logits_of(rotated(source, ROTATION))

    torch.testing.assert_close(turned, logits_of(source), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_with_both_ends_installed_computes_the_same(tmp_path, family):
    source = save_tiny_model(tmp_path, family)
    whole = write_whole(source, ROTATION)

    with torch.no_grad():
        turned, plain = whole(TOKENS).logits, load_full_precision(source)(TOKENS).logits

    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-4)


def test_the_names_of_a_whole_models_tensors_stay(tmp_path):
    source = save_tiny_model(tmp_path)

    names = list(write_whole(source, ROTATION).state_dict())

    assert names == list(load_full_precision(source).state_dict())


def test_a_resident_rotated_model_gives_the_rotated_parts(tmp_path):
    source = save_tiny_model(tmp_path)
    architecture = check_config(read_config(source))
    resident = ResidentModel(architecture=architecture, skeleton=write_whole(source, ROTATION))

    turned = logits_of(resident)

    torch.testing.assert_close(turned, logits_of(SourceModel.open(source)), rtol=0, atol=1e-4)
    rows = rotated(SourceModel.open(source), ROTATION).load_embedding()
    assert torch.equal(resident.load_embedding(), rows)


def test_the_rotation_changes_hidden_states_and_weights(tmp_path):
    source = SourceModel.open(save_tiny_model(tmp_path))
    plain, turned = source.load_block(0), rotated(source, ROTATION).load_block(0)

    names = [name for name, each in plain.state_dict().items()
             if torch.allclose(each, turned.state_dict()[name], atol=1e-3)]  # fmt: skip

    # what the norms read no longer has an axis of its own, and biases of readers are not rotated
    assert names == [
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "mlp.gate_proj.bias",
        "mlp.up_proj.bias",
    ]


def test_norms_inside_layers_become_ones_and_those_of_heads_stay(tmp_path):
    source = SourceModel.open(save_tiny_model(tmp_path, "qwen3"))

    block = rotated(source, ROTATION).load_block(1)

    assert block.input_layernorm.weight.eq(1).all()
    assert block.post_attention_layernorm.weight.eq(1).all()
    assert torch.equal(block.self_attn.q_norm.weight, source.load_block(1).self_attn.q_norm.weight)


def test_a_model_in_memory_is_not_changed_by_its_rotated_view(tmp_path):
    folder = save_tiny_model(tmp_path)
    whole = load_full_precision(folder)
    before = {name: each.clone() for name, each in whole.state_dict().items()}
    resident = ResidentModel(architecture=check_config(read_config(folder)), skeleton=whole)

    logits_of(RotatedModel(source=resident, seed=0))

    assert all(torch.equal(each, before[name]) for name, each in whole.state_dict().items())
    assert whole.state_dict().keys() == before.keys()


def test_another_seed_gives_other_weights_of_the_same_function(tmp_path):
    source = SourceModel.open(save_tiny_model(tmp_path))
    other = Rotation(seed=6, online_hadamard=False)

    weights = [
        rotated(source, each).load_block(0).self_attn.q_proj.weight for each in (ROTATION, other)
    ]

    assert not torch.allclose(*weights, atol=1e-3)
    torch.testing.assert_close(
        logits_of(rotated(source, other)), logits_of(source), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("online", [True, False])
def test_without_a_seed_the_source_is_seen_as_it_is(tmp_path, online):
    source = SourceModel.open(save_tiny_model(tmp_path))

    assert rotated(source, Rotation(seed=None, online_hadamard=online)) is source


def test_outliers_of_the_stream_are_spread_before_the_linears(tmp_path):
    folder = save_tiny_model(tmp_path)
    source = SourceModel.open(folder)
    embedding = source.load_embedding()
    embedding[:, 9] *= 30

    turned = ResidualRotation(64, 5)(embedding)

    def peak(each):
        return float((each.abs().amax(-1) / each.square().mean(-1).sqrt()).mean())

    assert peak(embedding) > 5
    assert peak(turned) < peak(embedding) / 2


def test_a_fused_producer_is_rotated_in_its_rows_alone(tmp_path):
    generator = torch.Generator().manual_seed(0)
    block = nn.ModuleDict({"fused": nn.Linear(24, 20), "out": nn.Linear(8, 24)})
    original = copy.deepcopy(block)
    pair = ChannelPair(
        name="out",
        kind=PairKind.LINEAR,
        producer="fused",
        consumers=("out",),
        rows=((4, 8), (12, 16)),
        head_dim=4,
    )
    x = torch.randn(3, 24, generator=generator)

    with torch.no_grad():
        module._rotate_heads(block, pair, 4)  # noqa: SLF001  # no supported family is fused yet

    read = [*range(4, 8), *range(12, 16)]
    rest = [row for row in range(20) if row not in read]
    torch.testing.assert_close(block["fused"](x)[:, rest], original["fused"](x)[:, rest])
    torch.testing.assert_close(
        block["out"](block["fused"](x)[:, read]), original["out"](original["fused"](x)[:, read])
    )
    assert not torch.allclose(block["fused"].weight, original["fused"].weight)


def test_a_rotated_embedding_shares_its_weight_with_a_tied_head():
    embedding = nn.Embedding(10, 24)

    turned = RotatedEmbedding(embedding, seed=1)

    assert list(turned.state_dict()) == ["weight"]
    assert turned.weight.data_ptr() == embedding.weight.data_ptr()
    ids = torch.tensor([[3, 4]])
    wanted = turned.rotation(embedding(ids))
    torch.testing.assert_close(turned(ids), wanted)
    torch.testing.assert_close(turned.rotation.inverse(wanted), embedding(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unrotated_norm_is_the_norm_of_the_plain_stream(dtype):
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.rand(24).to(dtype))
    norm = UnrotatedNorm(weight, 1e-6, seed=1)

    out = norm(norm.rotation(x).to(dtype))

    assert out.dtype == dtype
    wanted = nn.functional.rms_norm(x, (24,), weight.float(), 1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=tolerance)


def test_a_norm_without_an_epsilon_of_its_own_is_refused():
    with pytest.raises(UnsupportedModel, match="LayerNorm is no RMS norm"):
        UnrotatedNorm.of(nn.LayerNorm(8), seed=0)


def test_a_family_whose_stream_cannot_be_rotated_is_refused(tmp_path, monkeypatch):
    source = SourceModel.open(save_tiny_model(tmp_path))
    monkeypatch.setitem(TABLES, "llama", replace(TABLES["llama"], rotates=False))

    with pytest.raises(SpecError, match="the residual stream of llama cannot be rotated"):
        rotated(source, ROTATION)
