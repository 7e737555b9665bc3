"""The engine on a GPU against the engine on a CPU."""

import pytest
import torch

from engine.checkpoint.reader import load_checkpoint
from engine.grid import WeightGrid
from engine.inference.engine import open_engine
from engine.inference.kv_cache import make_cache
from engine.inference.request import GenerationRequest
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.rotated import ResidualRotation
from engine.modules.swap import quant_linears
from tests.unit.engine.quantized_models import save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("notation", ["w4a8", "w2*a8", "w4a4", "w3a8g32", "w8a8g32"])
@pytest.mark.parametrize("tokens", [1, 3, 70, 300])
def test_a_layer_gives_the_same_values_on_both(tmp_path, notation, tokens):
    directory = save_checkpoint(tmp_path, notation)[1]
    on_cpu = quant_linears(load_checkpoint(directory).model)
    on_gpu = quant_linears(load_checkpoint(directory, "cuda").model)
    # only the float32 sum over groups has an order
    tolerance = 1e-5 if "g" in notation else 0.0

    for name, layer in on_cpu.items():
        x = torch.randn(tokens, layer.in_features)
        found = on_gpu[name](x.cuda()).cpu()
        torch.testing.assert_close(found, layer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("notation", ["w4a16", "w3a16g32", "w4a8", "w4a8kv8"])
def test_logits_agree(tmp_path, notation):
    twin, directory, _ = save_checkpoint(tmp_path, notation)
    loaded = load_checkpoint(directory, "cuda")
    kv_bits = loaded.spec.kv_bits

    with torch.inference_mode():
        actual = loaded.model(TOKENS.cuda(), past_key_values=make_cache(2, kv_bits)).logits.cpu()
        expected = twin(TOKENS, past_key_values=make_cache(2, kv_bits)).logits
        twin.cuda()
        same_place = twin(TOKENS.cuda(), past_key_values=make_cache(2, kv_bits)).logits.cpu()

    assert torch.equal(actual, same_place)
    # attention differs between devices, which may move a rounded activation by one step
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.2)


@pytest.mark.parametrize("notation", ["w4a8", "w4a16", "w4a8kv4"])
def test_a_checkpoint_generates(tmp_path, notation):
    engine = open_engine(save_checkpoint(tmp_path, notation, head_dim=64)[1], "cuda")
    request = GenerationRequest(prompt_ids=(65, 66), max_tokens=20, seed=3, ignore_eos=True)

    first, second = (
        [(chunk.token_id, chunk.text) for chunk in engine.generate(request)] for _ in range(2)
    )

    assert len(first) == 20
    assert first == second


def test_packed_weights_stay_packed_where_activations_are_not_quantized(tmp_path):
    loaded = load_checkpoint(save_checkpoint(tmp_path, "w2a16")[1], "cuda")

    assert all(each.operand_bytes == 0 for each in quant_linears(loaded.model).values())


@pytest.mark.parametrize("width", [576, 1536, 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_gives_the_same_values_on_both(width, dtype):
    rotation = ResidualRotation(width, 3)
    x = torch.randn(4, width).to(dtype)
    on_cpu = rotation(x)

    on_gpu = rotation.cuda()(x.cuda())

    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=tolerance)


def test_a_rotation_is_recorded_in_a_graph():
    rotation = ResidualRotation(576, 3).cuda()
    x = torch.randn(1, 576, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        rotation(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rotation(x)

    x.copy_(torch.randn(1, 576))
    graph.replay()

    torch.testing.assert_close(out, rotation(x))


def test_a_twin_behind_a_transform_is_recorded_while_changes_are_learned():
    linear = torch.nn.Linear(256, 32, device="cuda")
    twin = FakeQuantLinear(
        linear,
        WeightGrid(bits=4, group_size=-1, symmetric=False, bit_balance=False),
        8,
        input_hadamard=256,
    )
    expected = twin.changed()[0].clone()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = twin.changed()[0]
    graph.replay()

    assert torch.equal(out, expected)
