import pytest
import torch

from kernels.activation_quant import dequantize_activations, quantize_activations
from kernels.kv_append import HeadNorms, HeadStates, Rotary, append_kv, append_kv_reference
from kernels.kv_pages import KvPages, pack_fields, unpack_fields
from kernels.layer_math import Norm, NormKind
from tests.kernels.kv_cases import fresh_module


@pytest.fixture
def kernel(monkeypatch, device):
    """`kernels.kv_append` whose Triton kernel runs here."""
    return fresh_module("kv_append", interpreted=device == "cpu", monkeypatch=monkeypatch)


def states_of(tokens, query_heads, kv_heads, head_dim, dtype, device):
    """Views of one packed query-key-value product, as a decoder layer has them."""
    packed = torch.randn(tokens, (query_heads + 2 * kv_heads) * head_dim).to(device, dtype)
    heads = packed.view(tokens, -1, head_dim)
    query, key, value = heads.split([query_heads, kv_heads, kv_heads], dim=1)
    return HeadStates(query=query, key=key, value=value)


def rotary_of(tokens, rotated, device):
    angles = torch.rand(64, rotated // 2) * 6
    positions = torch.randint(0, 64, (tokens,), dtype=torch.int32)
    return Rotary(
        cos=angles.cos().to(device), sin=angles.sin().to(device), positions=positions.to(device)
    )


def poisoned_pages(bits, kv_heads, head_dim, dtype, device):
    pages = KvPages.allocate(4, kv_heads, head_dim, bits=bits, dtype=dtype, device=device)
    for tensor in (pages.codes, pages.scale, pages.zero_point):
        tensor.fill_(77)
    return pages


def assert_same_pages(a, b):
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize(
    ("head_dim", "rotated", "dtype"), [(80, 32, torch.float16), (64, 64, torch.bfloat16)]
)
def test_the_kernel_writes_the_bits_of_the_reference(
    kernel, device, bits, dtype, head_dim, rotated
):
    states = states_of(3, 4, 3, head_dim, dtype, device)
    rotary = rotary_of(3, rotated, device)
    slots = torch.tensor([17, -1, 63], dtype=torch.int32, device=device)
    actual, expected = (poisoned_pages(bits, 3, head_dim, dtype, device) for _ in range(2))

    query = kernel.launch_append_kv(actual, states, slots, rotary)

    wanted = append_kv_reference(expected, states, slots, rotary)
    assert torch.equal(query, wanted)
    assert_same_pages(actual, expected)


@pytest.mark.parametrize("rotated", [0, 32])
@pytest.mark.parametrize("case", [
    (2, 80, torch.float16, NormKind.RMS),
    (8, 64, torch.bfloat16, NormKind.RMS),
    (16, 128, torch.bfloat16, NormKind.RMS_PLUS_ONE),
])  # fmt: skip
def test_heads_are_normalized_before_they_rotate_as_by_the_reference(kernel, device, case, rotated):
    bits, head_dim, dtype, kind = case
    states = states_of(3, 4, 3, head_dim, dtype, device)
    norms = HeadNorms(query=norm_of(head_dim, kind, 1e-6, dtype, device),
                      key=norm_of(head_dim, kind, 1e-5, dtype, device))  # fmt: skip
    rotary = rotary_of(3, rotated, device) if rotated else None
    slots = torch.tensor([17, -1, 63], dtype=torch.int32, device=device)
    actual, expected = (poisoned_pages(bits, 3, head_dim, dtype, device) for _ in range(2))

    query = kernel.launch_append_kv(actual, states, slots, rotary, norms=norms)

    wanted = append_kv_reference(expected, states, slots, rotary, norms=norms)
    assert torch.equal(query, wanted)
    assert_same_pages(actual, expected)


def norm_of(head_dim, kind, eps, dtype, device):
    weight = (1 + 0.3 * torch.randn(head_dim)).to(device, dtype)
    return Norm(kind=kind, weight=weight, eps=eps)


def test_a_layer_norm_of_heads_is_refused(device):
    ones = torch.ones(64, device=device)
    norm = Norm(kind=NormKind.LAYER, weight=ones, bias=ones, eps=1e-5)

    with pytest.raises(ValueError, match="need RMS norms of one kind, got layer"):
        HeadNorms(query=norm, key=norm)


@pytest.mark.parametrize("bits", [4, 16])
def test_without_a_rotary_embedding_states_are_written_as_they_are(kernel, device, bits):
    states = states_of(3, 4, 2, 128, torch.float16, device)
    slots = torch.tensor([5, 6, 7], device=device)
    actual, expected = (poisoned_pages(bits, 2, 128, torch.float16, device) for _ in range(2))

    query = kernel.launch_append_kv(actual, states, slots)

    append_kv_reference(expected, states, slots)
    assert query is states.query
    assert_same_pages(actual, expected)


# numpy warns where the interpreter meets them
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bits", [2, 8])
def test_extreme_tokens_are_quantized_as_any_activation(kernel, device, bits):
    states = states_of(5, 1, 1, 64, torch.float16, device)
    states.key[0] = 0
    states.key[1] = 65504
    states.key[2] = -3
    states.value[3, 0, 7] = float("inf")
    states.value[4, 0, 9] = float("nan")
    pages = poisoned_pages(bits, 1, 64, torch.float16, device)

    kernel.launch_append_kv(pages, states, torch.arange(5, device=device))

    read = pages.stored(torch.arange(5, device=device))
    for side, x in enumerate((states.key[:, 0], states.value[:, 0])):
        expected = dequantize_activations(quantize_activations(x, bits))
        assert torch.equal(read[side, 0].isnan(), expected.isnan())
        assert torch.equal(read[side, 0].nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_stored_is_what_the_quantizer_stands_for(bits):
    states = states_of(6, 2, 2, 96, torch.bfloat16, "cpu")
    pages = KvPages.allocate(2, 2, 96, bits=bits)
    slots = torch.tensor([30, 2, 9, 16, 0, 31])

    append_kv(pages, states, slots)

    rows = states.key.reshape(-1, 96)
    expected = dequantize_activations(quantize_activations(rows, bits)).view(6, 2, 96)
    assert torch.equal(pages.stored(slots)[0], expected.transpose(0, 1))


def test_rotation_is_that_of_a_decoder_module():
    states = states_of(4, 2, 2, 64, torch.bfloat16, "cpu")
    rotary = rotary_of(4, 64, "cpu")
    pages = KvPages.allocate(1, 2, 64, bits=16, dtype=torch.bfloat16)

    query = append_kv(pages, states, torch.arange(4), rotary)

    cos, sin = (
        torch.cat([t[rotary.positions]] * 2, dim=-1).bfloat16().unsqueeze(1)
        for t in (rotary.cos, rotary.sin)
    )
    x = states.query
    turned = torch.cat([-x[..., 32:], x[..., :32]], dim=-1)
    assert torch.equal(query, x * cos + turned * sin)


@pytest.mark.parametrize("field", [2, 4, 8])
def test_fields_survive_packing(field):
    codes = torch.randint(0, 1 << field, (3, 80), dtype=torch.uint8)

    assert torch.equal(unpack_fields(pack_fields(codes, field), field), codes)
    assert pack_fields(codes, field).shape == (3, 10 * field)


@pytest.mark.parametrize(
    ("bits", "head_dim", "expected"), [(16, 128, 512), (8, 128, 266), (4, 128, 138), (2, 128, 74)]
)
def test_a_token_takes_its_codes_and_five_bytes_a_row(bits, head_dim, expected):
    assert KvPages.allocate(3, 2, head_dim, bits=bits).bytes_per_token == 2 * expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 1}, "bits must be"),
        ({"page_size": 8}, "page_size must be"),
        ({"page_size": 24}, "page_size must be"),
        ({"head_dim": 100}, "head_dim must be"),
        ({"bits": 16, "dtype": torch.float32}, "dtype must be"),
    ],
)
def test_what_cannot_be_stored_is_refused(changed, message):
    options = {"head_dim": 64, "bits": 4} | changed

    with pytest.raises(ValueError, match=message):
        KvPages.allocate(1, 1, **options)


def test_states_of_another_shape_are_refused():
    states = states_of(2, 2, 2, 64, torch.float16, "cpu")

    with pytest.raises(ValueError, match="key and value must be"):
        append_kv(KvPages.allocate(1, 4, 64, bits=4), states, torch.arange(2))


def test_more_tokens_take_more_heads_a_program(kernel):
    few, many = kernel.select_config(1, 8), kernel.select_config(512, 8)

    assert few.block_heads < many.block_heads
    assert kernel.select_config(512, 8, {1: few}) == few
