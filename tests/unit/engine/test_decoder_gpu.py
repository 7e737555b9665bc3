"""The decoder's kernels against its plain torch: on a GPU, and in Triton's interpreter."""

import gc
from dataclasses import replace

import pytest
import torch
import triton
from torch.profiler import ProfilerActivity, profile

from engine.checkpoint.reader import load_checkpoint
from engine.inference.decoder import Decoder
from engine.inference.decoder.gpu import GpuDevice
from engine.rotation import Rotation
from engine.spec import LayerOverride, QuantSpec
from kernels import attended_tokens, kv_append, paged_attention, paged_prefill
from kernels._token_kernel import token_kernel
from tests.tiny_models import save_tiny_model
from tests.unit.engine.paged_text import (
    TOKENS,
    Sequence,
    advance,
    batch_of,
    load_rotated,
    logits_in_chunks,
)
from tests.unit.engine.quantized_models import save_checkpoint

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
interpreted = pytest.mark.skipif(
    isinstance(token_kernel, triton.JITFunction), reason="Triton compiles here: TRITON_INTERPRET=1"
)
WIDE = {
    "opt": {"num_attention_heads": 1},
    "opt-350m": {"num_attention_heads": 1},
    "falcon-7b": {"num_attention_heads": 2, "hidden_size": 128},
    "falcon-40b": {"num_attention_heads": 4, "hidden_size": 256, "num_kv_heads": 2},
    "falcon-11b": {"num_attention_heads": 2, "hidden_size": 128, "num_kv_heads": 1},
    "phi3": {"num_attention_heads": 2, "hidden_size": 128, "num_key_value_heads": 1},
}
"""Heads of 64, the least that kernels read; others take a `head_dim`."""
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "opt", "opt-350m", "falcon-7b", "falcon-40b",
    "falcon-11b", "gemma2", "gemma3_text", "phi3", "mixtral",
)  # fmt: skip
DRIFT = {torch.float16: 0.15, torch.bfloat16: 0.6}
"""Logits have a spread near 1. Attention rounds otherwise than on a CPU, so values of the stream
differ by a step of their dtype, and inputs at the border of two codes take the other one."""
OVERRIDES = (
    LayerOverride(pattern="*.k_proj", w_bits=2),
    LayerOverride(pattern="*.up_proj", a_bits=16),
    LayerOverride(pattern="*.o_proj", group_size=32),
    LayerOverride(pattern="*.v_proj", w_bits=16),
)


def saved(tmp_path, spec, family="llama", **fields):
    fields = WIDE.get(family, {"head_dim": 64}) | fields
    return save_checkpoint(tmp_path, spec, family, **fields)[1]


def on_cpu(directory, head_bits=None, dtype=torch.float16):
    loaded = load_checkpoint(directory, dtype=dtype, prepares=False)
    return Decoder.from_loaded(loaded, head_bits)


def on_device(directory, head_bits=None, dtype=torch.float16, **options):
    loaded = load_checkpoint(directory, "cuda", dtype, prepares=False)
    return Decoder.from_loaded(loaded, head_bits, **options)


def assert_close(found, expected, bound=DRIFT[torch.float16], *, astray=0.0):
    expected = expected.float().cpu()
    found = found.float().cpu()
    assert bool(found.isfinite().all())
    near = (found - expected).abs().amax(-1) <= bound
    if float((~near).float().mean()) <= astray:
        found, expected = found[near], expected[near]
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    # what flips is rare: most logits are much closer
    assert float((found - expected).abs().mean()) < bound / 5


@gpu
@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("notation", ["w8a16", "w4a8kv8"])
def test_every_family_gives_the_logits_of_a_cpu(tmp_path, family, notation):
    directory = saved(tmp_path, notation, family)
    kv_bits = QuantSpec.from_notation(notation).kv_bits

    found = logits_in_chunks(on_device(directory), kv_bits=kv_bits)

    # a router may send a token at the border of two experts to the other one
    astray = 0.1 if family == "mixtral" else 0.0
    expected = logits_in_chunks(on_cpu(directory), kv_bits=kv_bits)
    assert_close(found, expected, astray=astray)


@gpu
@on_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("notation", ["w8a16", "w4a8", "w4a8kv4"])
def test_bfloat16_gives_the_logits_of_a_cpu(tmp_path, family, notation):
    directory = saved(tmp_path, notation, family)
    kv_bits, dtype = QuantSpec.from_notation(notation).kv_bits, torch.bfloat16

    found = logits_in_chunks(on_device(directory, dtype=dtype), kv_bits=kv_bits)

    expected = logits_in_chunks(on_cpu(directory, dtype=dtype), kv_bits=kv_bits)
    assert_close(found, expected, DRIFT[dtype])


@gpu
@on_gpu
@pytest.mark.parametrize("launch_pdl", [False, True])
@pytest.mark.parametrize(("spec", "head_bits"), [
    (QuantSpec.from_notation("w2*a8g32kv4"), 8),
    (QuantSpec(w_bits=2, a_bits=8, half_step=True, kv_bits=8), 4),
    (QuantSpec.from_notation("w4a16g64"), 4),
    (QuantSpec(w_bits=8, a_bits=8, q_bits=8), None),
    (QuantSpec(w_bits=4, a_bits=8, overrides=OVERRIDES), 8),
])  # fmt: skip
def test_every_grid_gives_the_logits_of_a_cpu(tmp_path, spec, head_bits, launch_pdl):
    directory = saved(tmp_path, spec)

    decoder = on_device(directory, head_bits, launch_pdl=launch_pdl)

    found = logits_in_chunks(decoder, kv_bits=spec.kv_bits)
    expected = logits_in_chunks(on_cpu(directory, head_bits), kv_bits=spec.kv_bits)
    # keys and values of two bits move further
    assert_close(found, expected, 2 * DRIFT[torch.float16])


@gpu
@on_gpu
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bits", [None, 8])
def test_a_rotated_checkpoint_gives_the_logits_of_a_cpu(tmp_path, tied, head_bits):
    source = save_tiny_model(tmp_path, head_dim=64, tie_word_embeddings=tied)
    spec, rotation = QuantSpec(w_bits=4, a_bits=8), Rotation(seed=5, online_hadamard=True)
    loaded = load_rotated(source, spec, rotation, "cuda", torch.float16)

    found = logits_in_chunks(Decoder.from_loaded(loaded, head_bits), kv_bits=16)

    twin = load_rotated(source, spec, rotation, dtype=torch.float16)
    expected = logits_in_chunks(Decoder.from_loaded(twin, head_bits), kv_bits=16)
    # the kernel rounds what it transforms to the stream's dtype first
    assert_close(found, expected, 2 * DRIFT[torch.float16])


@gpu
@on_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_a_step_is_recorded_in_a_graph_and_replayed(tmp_path, family):
    decoder = on_device(saved(tmp_path, "w4a8kv8", family), 8, launch_pdl=True)
    pages = decoder.new_pages(12, kv_bits=8)
    sequences = [Sequence(ids=TOKENS, pages=(0, 1)), Sequence(ids=TOKENS.flip(0), pages=(2, 3))]
    advance(decoder, pages, [(each, 9) for each in sequences])
    batch = batch_of([(each, 1) for each in sequences], device="cuda")
    expected = decoder.forward(batch, pages).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decoder.forward(batch, pages)
    with torch.inference_mode():
        out.zero_()

    graph.replay()
    graph.replay()

    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@gpu
@on_gpu
@pytest.mark.parametrize(("family", "spec", "most"), [
    ("llama", QuantSpec.from_notation("w4a8kv8"), 10),
    ("llama", QuantSpec.from_notation("w2a8"), 10),
    ("llama", QuantSpec.from_notation("w4a16"), 10),
    ("qwen3", QuantSpec.from_notation("w4a8kv8"), 10),
    ("gemma3_text", QuantSpec.from_notation("w4a8kv8"), 12),
    ("falcon-7b", QuantSpec.from_notation("w4a8kv8"), 11),
])  # fmt: skip
def test_a_layer_keeps_to_its_launches(tmp_path, family, spec, most):
    counts = [launches(tmp_path / str(layers), family, spec, layers) for layers in (2, 4)]

    assert (counts[1] - counts[0]) / 2 <= most


def launches(folder, family, spec, layers):
    """Kernels of one decode step."""
    decoder = on_device(saved(folder, spec, family, layers=layers))
    # enough for a context in chunks
    pages = decoder.new_pages(40, kv_bits=spec.kv_bits)
    batch = batch_of([(Sequence(ids=TOKENS, pages=tuple(range(40))), 1)], device="cuda")
    decoder.forward(batch, pages)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        decoder.forward(batch, pages)
        torch.cuda.synchronize()
    return sum(each.count for each in seen.key_averages() if each.device_type.name == "CUDA")


@gpu
@on_gpu
def test_planes_do_not_stay_on_the_gpu(tmp_path):
    directory = saved(tmp_path, "w2a8", hidden_size=512, intermediate_size=2048)
    gc.collect()
    before = torch.cuda.memory_allocated()

    decoder = on_device(directory, 8)

    gc.collect()
    held = torch.cuda.memory_allocated() - before
    # tables of positions and counters are no weights
    assert held < decoder.weight_bytes * 1.1 + 2**20


@gpu
@on_gpu
def test_float32_is_refused(tmp_path):
    loaded = load_checkpoint(saved(tmp_path, "w4a8"), "cuda")

    with pytest.raises(ValueError, match="a GPU runs float16 or bfloat16"):
        Decoder.from_loaded(loaded)


@pytest.fixture
def forced_kernels(monkeypatch):
    """On tensors of a CPU, the kernels that a GPU would run; products stay their references."""
    monkeypatch.setattr(paged_attention, "paged_attention", paged_attention.launch_paged_attention)
    monkeypatch.setattr(paged_prefill, "paged_prefill", paged_prefill.launch_paged_prefill)
    monkeypatch.setattr(kv_append, "append_kv", kv_append.launch_append_kv)
    monkeypatch.setattr(attended_tokens, "attended_tokens", attended_tokens.launch_attended_tokens)


@interpreted
@pytest.mark.parametrize(("family", "notation"), [
    ("llama", "w4a8kv8"), ("llama", "w4a16"), ("qwen3", "w4a8kv8"), ("falcon-7b", "w4a8kv8"),
])  # fmt: skip
def test_the_kernels_of_a_gpu_give_the_logits_of_a_cpu(tmp_path, forced_kernels, family, notation):
    directory = saved(tmp_path, notation, family, layers=1)
    kv_bits, chunks = QuantSpec.from_notation(notation).kv_bits, (4, 1)
    # the interpreter has no bfloat16 product
    loaded = load_checkpoint(directory, dtype=torch.float16, prepares=False)
    decoder = Decoder.build(loaded, GpuDevice(torch.device("cpu"), torch.float16), head_bits=8)

    found = logits_in_chunks(decoder, kv_bits=kv_bits, chunks=chunks)

    expected = logits_in_chunks(on_cpu(directory, 8), kv_bits=kv_bits, chunks=chunks)
    assert_close(found, expected)


@pytest.fixture
def poisoned_memory():
    """Tensors that are not written yet hold NaN."""
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@interpreted
# the interpreter's numpy tells of rows that are NaN
@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered in cast")
@pytest.mark.parametrize("notation", ["w4a8kv8", "w4a16"])
def test_tokens_and_sequences_of_nobody_change_no_bit(
    tmp_path, forced_kernels, poisoned_memory, notation
):
    directory = saved(tmp_path, notation, layers=2)
    loaded = load_checkpoint(directory, dtype=torch.float16, prepares=False)
    decoder = Decoder.build(loaded, GpuDevice(torch.device("cpu"), torch.float16), head_bits=8)
    first, second = Sequence(ids=TOKENS, pages=(1,)), Sequence(ids=TOKENS.flip(0), pages=(0,))
    rows = torch.tensor([2, 4])
    batch = batch_of([(first, 3), (second, 2)], logit_rows=rows)
    zeros = torch.zeros(3, dtype=torch.int64)
    filled = replace(
        batch,
        token_ids=torch.cat([batch.token_ids, zeros]),
        positions=torch.cat([batch.positions, zeros]),
        kv_slots=torch.cat([batch.kv_slots, zeros - 1]),
        block_table=torch.cat([batch.block_table, torch.full((2, 1), 2, dtype=torch.int32)]),
        lengths=torch.cat([batch.lengths, zeros[:2].int()]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:], batch.cu_seqlens[-1:]]),
        logit_rows=torch.cat([rows, zeros[:2]]),
    )
    kv_bits = QuantSpec.from_notation(notation).kv_bits
    pages = [decoder.new_pages(3, kv_bits=kv_bits) for _ in range(2)]

    expected = decoder.forward(batch, pages[0])
    found = decoder.forward(filled, pages[1])

    assert bool(expected.isfinite().all())
    assert torch.equal(found[:2], expected)
    assert all(torch.equal(*[each.codes for each in layer]) for layer in zip(*pages, strict=True))


@interpreted
def test_the_kernels_transform_inputs_as_a_cpu_does(tmp_path, forced_kernels):
    source = save_tiny_model(tmp_path, head_dim=64, layers=1)
    spec, rotation = QuantSpec(w_bits=4, a_bits=8), Rotation(seed=5, online_hadamard=True)
    loaded = load_rotated(source, spec, rotation, dtype=torch.float16)
    device = GpuDevice(torch.device("cpu"), torch.float16)

    found = logits_in_chunks(Decoder.build(loaded, device), kv_bits=16, chunks=(3, 1))

    twin = Decoder.from_loaded(load_rotated(source, spec, rotation, dtype=torch.float16))
    assert_close(found, logits_in_chunks(twin, kv_bits=16, chunks=(3, 1)))
