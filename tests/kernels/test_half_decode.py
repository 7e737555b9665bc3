import pytest
import torch

from kernels import half_decode as module
from kernels.half_decode import (
    HalfDecodeConfig,
    HalfDecodeShape,
    can_half_decode,
    half_decode,
    half_decode_configs,
)
from kernels.half_linear import half_linear_reference
from tests.kernels.gluon_emulator import EmulatedKernel
from tests.kernels.tile_cases import random_codes, sliced_weight

GPU = torch.cuda.is_available()
SMALL = HalfDecodeConfig(row_tiles=2, warps=2, steps=1)
DTYPES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(autouse=True)
def runnable(monkeypatch):
    """Run the Gluon kernel: on the GPU, else on NumPy."""
    if not GPU:
        kernel = EmulatedKernel("half_decode_kernel", file="_half_decode_kernel.py")
        monkeypatch.setattr(module, "half_decode_kernel", kernel)


def within_the_bound(actual, x, codes, weight, bias=None, warps=2):
    """The bound of the module, and one rounding of the result."""
    expected = half_linear_reference(x, codes, weight, bias)
    n = len(codes)
    chain = -(-weight.columns // (64 * warps)) + 8
    u = weight.multiplier * (1 << weight.bits) + weight.zero_point[:n].abs().double() + 256
    size = x.double().abs().view(len(x), weight.groups, -1).sum(2)
    lost = size @ (u * weight.scale[:n].double()).t() * (17 * chain * 2.0**-23)
    rounding = torch.finfo(x.dtype)
    allowed = lost + expected.abs() * rounding.eps + rounding.smallest_normal * rounding.eps
    return bool(((actual.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_is_exact_but_for_float32(device, bits, dtype):
    weight, codes = sliced_weight(random_codes(70, 1104, bits), bits, device=device)
    x = torch.randn(3, 1104, device=device).to(dtype)
    bias = torch.randn(70, device=device)

    actual = half_decode(x, weight, bias, config=SMALL)

    assert actual.dtype == dtype
    assert within_the_bound(actual, x, codes, weight, bias)


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize(("bits", "columns"), [(1, 512), (3, 2048), (4, 1536), (8, 512)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_are_scaled_one_by_one(device, m, bits, columns, dtype):
    weight, codes = sliced_weight(
        random_codes(33, columns, bits), bits, groups=columns // 128, slice_bytes=64, device=device
    )
    x = torch.randn(m, columns, device=device).to(dtype)

    actual = half_decode(x, weight, config=SMALL)

    assert within_the_bound(actual, x, codes, weight)


@pytest.mark.parametrize(
    "config",
    [
        HalfDecodeConfig(row_tiles=1, warps=1, steps=1),
        HalfDecodeConfig(row_tiles=1, warps=4, steps=2),
        HalfDecodeConfig(row_tiles=4, warps=2, steps=3),
    ],
)
@pytest.mark.parametrize(("k", "g"), [(2816, 32), (2048, 64), (3072, 128)])
def test_every_way_to_share_k_agrees(device, config, k, g):
    weight, codes = sliced_weight(
        random_codes(70, k, 5), 5, slice_bytes=g, half_step=True, device=device
    )
    x = torch.randn(2, k, device=device).half()

    actual = half_decode(x, weight, config=config)

    assert within_the_bound(actual, x, codes, weight, warps=config.warps)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_activations_pick_single_weights(device, bits, dtype):
    weight, codes = sliced_weight(random_codes(64, 1024, bits), bits, device=device)
    rows = torch.arange(8, device=device)
    columns = rows * 131 % 1024
    x = torch.zeros(8, 1024, device=device).to(dtype)
    x[rows, columns] = 1

    actual = half_decode(x, weight, config=SMALL)

    whole = codes[:, columns].t() - weight.zero_point[:64, 0]
    assert torch.equal(actual, (whole.float() * weight.scale[:64, 0].float()).to(dtype))


def test_the_largest_and_the_smallest_activations_stay_in_range(device):
    weight, codes = sliced_weight(random_codes(16, 512, 8, fill=255), 8, device=device)
    weight.scale.fill_(2.0**-24)
    x = torch.full((2, 512), 65504.0, device=device).half()
    x[1] = 2.0**-24

    actual = half_decode(x, weight, config=SMALL)

    assert torch.isfinite(actual).all()
    assert within_the_bound(actual, x, codes, weight)


def test_rows_may_lie_apart(device):
    weight, codes = sliced_weight(random_codes(20, 512, 4), 4, device=device)
    x = torch.randn(3, 1024, device=device).half()[:, :512]

    actual = half_decode(x, weight, config=SMALL)

    assert within_the_bound(actual, x, codes, weight)


@pytest.mark.parametrize("stride", [1, 515])
def test_where_a_row_after_the_only_one_would_lie_does_not_matter(device, stride):
    weight, codes = sliced_weight(random_codes(20, 512, 4), 4, device=device)
    x = torch.randn(1030, device=device).half().as_strided((1, 512), (stride, 1))

    actual = half_decode(x, weight, config=SMALL)

    assert within_the_bound(actual, x, codes, weight)


def test_no_tokens_are_no_product():
    weight, _ = sliced_weight(random_codes(20, 512, 4), 4)

    assert half_decode(torch.zeros(0, 512).half(), weight).shape == (0, 20)


def test_operands_that_another_kernel_takes_are_told_apart():
    weight, _ = sliced_weight(random_codes(8, 512, 4), 4)
    grouped, _ = sliced_weight(random_codes(8, 512, 4), 4, groups=8)
    odd, _ = sliced_weight(random_codes(8, 300, 4), 4)
    x = torch.zeros(4, 512).half()

    assert can_half_decode(x, weight)
    assert not can_half_decode(torch.zeros(9, 512).half(), weight)
    assert not can_half_decode(torch.zeros(4, 516).half()[:, :512], weight)
    assert not can_half_decode(torch.zeros(4, 520).half()[:, 1:513], weight)
    assert not can_half_decode(torch.zeros(4, 300).half(), odd)
    assert not can_half_decode(x, grouped)
    with pytest.raises(ValueError, match="groups of 64 columns in slices of 32 bytes"):
        half_decode(x, grouped)


def test_launches_that_do_not_fit_are_refused():
    weight, _ = sliced_weight(random_codes(8, 512, 4), 4)
    wide = HalfDecodeConfig(row_tiles=8, warps=1, steps=1)

    with pytest.raises(ValueError, match="8 row tiles do not divide a block of 64"):
        half_decode(torch.zeros(1, 512).half(), weight, config=wide)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        half_decode(torch.zeros(1, 512), weight)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n", "columns"), [(4096, 4096), (22016, 4096), (8192, 28672), (64, 256)])
def test_candidates_are_distinct_and_fit(bits, n, columns):
    configs = half_decode_configs(HalfDecodeShape(bits=bits, n=n, columns=columns))

    assert 2 <= len(set(configs)) == len(configs) <= 24
    assert all(config.warps * (config.steps - 1) < -(-columns // 512) for config in configs)
    assert not configs[-1].launch_pdl


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_candidate_is_right_on_a_gpu(bits, dtype):
    weight, codes = sliced_weight(random_codes(1040, 4096, bits), bits, device="cuda")
    shape = HalfDecodeShape(bits=bits, n=1040, columns=4096, is_half=dtype is torch.float16)
    x = torch.randn(5, 4096, device="cuda").to(dtype)

    results = [half_decode(x, weight, config=config) for config in half_decode_configs(shape)]

    assert all(within_the_bound(result, x, codes, weight, warps=1) for result in results)
