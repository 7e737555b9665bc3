"""Experts with linears of their own, and where their weights lie in the files of a source."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.architecture import check_config
from engine.errors import CheckpointInvalid, UnsupportedModel
from engine.families.stored import StoredPart
from engine.models.experts import SeparateExperts
from engine.models.loading import SourceModel, load_full_precision, read_config
from tests.tiny_models import load_reference, make_tiny_model, save_tiny_model

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path, "mixtral")


def make_pair():
    """The library's experts, and ours with the same weights."""
    fused = make_tiny_model("mixtral", layers=1).model.layers[0].mlp.experts
    sizes = check_config(
        make_tiny_model("mixtral", layers=1).config.to_dict() | {"quantization_config": None}
    ).sizes
    ours = SeparateExperts(sizes, torch.nn.SiLU())
    for number, expert in enumerate(ours):
        gate, up = fused.gate_up_proj[number].detach().chunk(2)
        expert.gate_proj.weight.data = gate.clone()
        expert.up_proj.weight.data = up.clone()
        expert.down_proj.weight.data = fused.down_proj[number].detach().clone()
    return fused, ours


def route(*tokens):
    chosen = torch.tensor(tokens)
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(len(chosen), 64, generator=generator),
        chosen,
        torch.rand(chosen.shape, generator=generator),
    )


def test_separate_experts_compute_what_the_fused_ones_do():
    fused, ours = make_pair()
    routed = route((0, 1), (3, 2), (1, 3), (2, 0))

    torch.testing.assert_close(ours(*routed), fused(*routed), rtol=1e-5, atol=1e-6)


def test_an_expert_that_no_token_chose_changes_nothing_and_learns_nothing():
    fused, ours = make_pair()
    routed = route((0, 1), (1, 0), (1, 3))

    out = ours(*routed)
    out.square().sum().backward()

    torch.testing.assert_close(out, fused(*routed), rtol=1e-5, atol=1e-6)
    assert ours[2].up_proj.weight.grad is None
    assert all(bool((ours[n].up_proj.weight.grad != 0).any()) for n in (0, 1, 3))


def test_sixteen_bit_experts_answer_in_sixteen_bits():
    _, ours = make_pair()
    hidden, chosen, weights = route((0, 1), (1, 2))

    out = ours.to(torch.bfloat16)(hidden.to(torch.bfloat16), chosen, weights)

    assert out.dtype is torch.bfloat16


def fuse(weights):
    """Write the experts of a file as transformers 5 holds them in memory."""
    fused = {}
    for name in weights:
        if ".experts." not in name:
            fused[name.replace("block_sparse_moe", "mlp")] = weights[name]
    for layer in range(2):
        old, new = (f"model.layers.{layer}.{each}" for each in ("block_sparse_moe", "mlp"))
        parts = {
            part: torch.stack([weights[f"{old}.experts.{n}.{part}.weight"] for n in range(4)])
            for part in ("w1", "w2", "w3")
        }
        fused[f"{new}.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], dim=1)
        fused[f"{new}.experts.down_proj"] = parts["w2"]
    return fused


def test_both_layouts_of_files_give_the_same_model(folder):
    weights = load_file(folder / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in weights
    older = load_full_precision(folder).state_dict()
    with torch.no_grad():
        wanted = load_reference(folder, "mixtral")(TOKENS).logits

    save_file(fuse(weights), folder / "model.safetensors")

    model = load_full_precision(folder)
    assert all(torch.equal(each, older[name]) for name, each in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_file_with_too_few_experts_is_refused(folder):
    weights = fuse(load_file(folder / "model.safetensors"))
    name = "model.layers.1.mlp.experts.down_proj"
    save_file({**weights, name: weights[name][:3].clone()}, folder / "model.safetensors")

    with pytest.raises(CheckpointInvalid, match=r"holds no expert 3"):
        SourceModel.open(folder).load_block(1)


def test_a_missing_expert_is_named_as_the_engine_calls_it(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(CheckpointInvalid, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        SourceModel.open(folder)


def test_a_part_knows_its_shape_without_the_tensor(folder):
    architecture = check_config(read_config(folder))
    stored = {"model.layers.0.mlp.experts.gate_up_proj": (4, 128, 64)}

    part = architecture.find_stored("model.layers.0.mlp.experts.3.up_proj.weight", stored)

    assert part == StoredPart(tensor="model.layers.0.mlp.experts.gate_up_proj", expert=3, half=1)
    assert part.shape((4, 128, 64)) == (64, 64)
    assert part.shape((3, 128, 64)) == ()
    assert part.shape((128, 64)) == ()
    for name in ("4.other.weight", "up_proj.weight", "0.up_proj.bias"):
        assert architecture.find_stored(f"model.layers.0.mlp.experts.{name}", stored) is None


def test_more_experts_for_a_token_than_there_are_is_refused(folder):
    config = {**read_config(folder), "num_experts_per_tok": 5}

    with pytest.raises(UnsupportedModel, match="num_experts_per_tok = 5"):
        check_config(config)
