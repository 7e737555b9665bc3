import numpy as np
import pytest
import torch

from kernels.field_codes import join_assembly
from kernels.half_codes import centred_assembly
from kernels.half_linear import HalfConfig, half_configs
from kernels.sliced import field_widths
from tests.kernels.assembly import run_assembly
from tests.kernels.tile_cases import load_kernel_modules, random_codes, sliced_weight

SMALL = HalfConfig(block_m=8, block_n=64, block_k=64, num_warps=4, num_stages=3)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture
def half_linear(monkeypatch, device):
    names = ["field_codes", "unpack", "split_sum", "half_codes", "half_linear"]
    return load_kernel_modules(names, interpreted=device == "cpu", monkeypatch=monkeypatch)


def within_one_rounding_of_the_weight(actual, x, codes, weight, module, bias=None):
    """One rounding of every weight to the dtype, and one of the result."""
    expected = module.half_linear_reference(x, codes, weight, bias)
    n, k = codes.shape
    w = codes.double().view(n, weight.groups, -1) * weight.multiplier
    w = (w - weight.zero_point[:n, :, None]) * weight.scale[:n, :, None].double()
    # the interpreter cuts bfloat16 where a GPU rounds it
    one = torch.finfo(x.dtype).eps
    allowed = x.double().abs() @ w.view(n, k).abs().t() * one / 2 + expected.abs() * one
    return bool(((actual.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_width_is_as_near_as_one_rounding_of_the_weight(half_linear, device, bits, dtype):
    weight, codes = sliced_weight(random_codes(70, 300, bits), bits, device=device)
    x = torch.randn(3, 300, device=device).to(dtype)
    bias = torch.randn(70, device=device)

    actual = half_linear.half_linear(x, weight, bias, config=SMALL)

    assert actual.dtype == dtype
    assert within_one_rounding_of_the_weight(actual, x, codes, weight, half_linear, bias)


@pytest.mark.parametrize(("m", "groups"), [(1, 1), (8, 4), (17, 1), (18, 4)])
def test_small_batches_and_splits_of_k_agree(half_linear, device, m, groups):
    weight, codes = sliced_weight(
        random_codes(65, 512, 4), 4, groups=groups, half_step=True, device=device
    )
    x = torch.randn(m, 512, device=device).half()
    config = HalfConfig(
        block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3, splits=1 + m % 3
    )

    actual = half_linear.half_linear(x, weight, config=config)

    assert within_one_rounding_of_the_weight(actual, x, codes, weight, half_linear)


def test_one_hot_activations_pick_single_weights(half_linear, device):
    weight, codes = sliced_weight(random_codes(64, 512, 3), 3, device=device)
    x = torch.zeros(16, 512, device=device).half()
    columns = torch.arange(16, device=device) * 29 % 512
    x[torch.arange(16, device=device), columns] = 1

    actual = half_linear.half_linear(x, weight, config=SMALL)

    whole = codes[:, columns].t() - weight.zero_point[:64, 0]
    assert torch.equal(actual, (whole.float() * weight.scale[:64, 0].float()).half())


def test_many_tokens_take_the_dense_weight(half_linear, unpack, device):
    weight, codes = sliced_weight(random_codes(64, 256, 4), 4, groups=2, device=device)
    x = torch.randn(65, 256, device=device).half()

    actual = half_linear.half_linear(x, weight)

    assert within_one_rounding_of_the_weight(actual, x, codes, weight, half_linear)


@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (3, 4), (7, 1), (8, 2)])
def test_the_dense_weight_is_rounded_once(unpack, device, bits, groups):
    weight, codes = sliced_weight(random_codes(70, 512, bits), bits, groups=groups, device=device)

    actual = unpack.unpack_half(weight, torch.float16)

    assert torch.equal(actual, unpack.unpack_half_reference(codes, weight, torch.float16))


@pytest.mark.parametrize("m", [1, 8, 64])
def test_candidates_start_small_and_are_distinct(m):
    configs = half_configs(bits=2, m=m, n=4096, columns=4096)

    assert len(set(configs)) == len(configs)
    assert all(config.block_m >= m for config in configs)


def test_activations_that_do_not_fit_are_refused(half_linear):
    weight, _ = sliced_weight(random_codes(8, 256, 4), 4)

    with pytest.raises(ValueError, match="float16 or bfloat16"):
        half_linear.half_linear(torch.zeros(1, 256), weight)
    with pytest.raises(ValueError, match="K = 256"):
        half_linear.half_linear(torch.zeros(1, 128).half(), weight)


# ---- the assembly that the interpreter cannot run, step by step in NumPy


def every_field(bits):
    """Runs of random bytes, one for each field, padded to three."""
    words = [np.random.default_rng(bits + i).integers(0, 2**32, 500) for i in range(3)]
    widths = (*field_widths(bits), 0, 0)[:3]
    return [word.astype(np.uint32) for word in words], widths


def expected_codes(words, widths, s):
    code, up = 0, 0
    for word, width in zip(words, widths, strict=True):
        if width:
            byte = word.view(np.uint8).astype(np.int64)
            code = code + (((byte >> (s * width % 8)) & ((1 << width) - 1)) << up)
            up += width
    return code


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("s", range(8))
def test_the_assembly_joins_the_fields_of_four_codes(bits, s):
    words, widths = every_field(bits)

    result = run_assembly(join_assembly(*widths, s), words)

    assert np.array_equal(result.astype(np.uint32).view(np.uint8), expected_codes(words, widths, s))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("odd", [0, 1])
def test_the_assembly_makes_exact_numbers_of_either_column(bits, is_half, odd):
    words, widths = every_field(bits)
    for s in range(8 // widths[0] if bits == 8 else 8):
        codes = expected_codes(words, widths, s)[odd::2]
        codes = (codes ^ 128) - 128 if bits == 8 else codes - (1 << (bits - 1))

        result = run_assembly(centred_assembly(*widths, s, odd, is_half), words)

        assert np.array_equal(result.numpy(), codes)
