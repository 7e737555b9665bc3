import pytest
import torch

from kernels.field_codes import centre_assembly
from kernels.layouts import pack_codes
from kernels.prefill_config import GroupShape, PrefillConfig, group_configs
from kernels.prefill_linear import prefill_linear
from kernels.sliced import field_widths, slice_weight
from tests.kernels.assembly import run_assembly
from tests.kernels.hopper_emulator import emulated_prefill
from tests.kernels.tile_cases import random_codes, sliced_weight, token_codes

SHARED_BYTES = 227 * 1024


def exact_and_slack(tokens, codes, weight, bias=None):
    """The product in float64, and how far rounding may lead from it.

    A step rounds the running total, of which the scaled sums and what alternates between 0 and B
    are parts; four roundings more are those of the end.
    """
    n, k = codes.shape
    groups, bound = weight.groups, weight.group_rows.bound_for(tokens.bits)
    scale = weight.scale[:n].double()
    v = codes.view(n, groups, -1).double() * weight.multiplier - weight.zero_point[:n, :, None]
    u = tokens.codes[:, :k].view(-1, groups, k // groups).double()
    sums = torch.einsum("mgk,ngk->mng", u, v) * scale
    shift = tokens.zero_point.double()[:, None] * (v.sum(2) * scale).sum(1)
    exact = (sums.sum(2) - shift) * tokens.scale.double()[:, None]
    signs = 1 - 2 * (torch.arange(groups, device=codes.device) % 2)
    walk = bound * weight.multiplier * (scale * signs).cumsum(1).abs().amax(1)
    size = (sums.abs().sum(2) + walk) * (groups + 4) + 4 * shift.abs()
    if bias is not None:
        exact = exact + bias.double()
    return exact, size * tokens.scale.double()[:, None] * 2.0**-24 + exact.abs() * 2.0**-24


def shape_of(weight, m):
    return GroupShape(
        field_bits=weight.field_bits, slice_bytes=weight.slice_bytes,
        group_slices=weight.group_size // weight.slice_bytes, m=m, n=weight.padded_rows,
    )  # fmt: skip


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize(("slice_bytes", "group_slices"), [(64, 2), (32, 4), (32, 2), (128, 1)])
@pytest.mark.parametrize("m", [64, 300, 2048])
def test_candidates_fit_shared_memory_and_waste_no_more_than_a_tile(
    bits, slice_bytes, group_slices, m
):
    shape = GroupShape(
        field_bits=field_widths(bits), slice_bytes=slice_bytes, group_slices=group_slices,
        m=m, n=4096,
    )  # fmt: skip

    configs = group_configs(shape)

    for config in configs:
        programs = config.programs // 132
        assert programs * config.shared_bytes(shape.field_bits, config.turn) < SHARED_BYTES
        assert config.turn % group_slices == 0
        assert config.block_m < 2 * m
    assert len(set(configs)) == len(configs)


def test_four_bits_take_the_widest_tile_that_does_not_spill_and_two_bits_a_square_one():
    four = GroupShape(field_bits=(4,), slice_bytes=64, group_slices=2, m=2048, n=4096)
    two = GroupShape(field_bits=(2,), slice_bytes=64, group_slices=2, m=2048, n=4096)

    assert (group_configs(four)[0].block_m, group_configs(four)[0].block_n) == (256, 128)
    assert (group_configs(two)[0].block_m, group_configs(two)[0].block_n) == (128, 128)


def test_a_neighbours_launch_is_cut_to_what_fits():
    config = PrefillConfig(block_m=256, block_n=128, block_k=64, stages=4)

    fitted = config.fitted((4, 2, 1), 64, 2)

    assert fitted.stages >= 2
    assert fitted.block_m == 64
    assert fitted.shared_bytes((4, 2, 1), 8) < SHARED_BYTES
    assert config.fitted((4,), 32, 4).block_k == 32


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("bits", range(1, 8))
def test_zero_points_leave_every_code_of_every_slice(bits, multiplier):
    words = torch.randint(-(1 << 31), 1 << 31, (3, 64)).numpy().astype("uint32")
    fields = (*field_widths(bits), 0, 0)[:3]
    zero = 40
    centres = torch.full((64,), (128 - zero) * 0x01010101).numpy().astype("uint32")
    for s in range(8):
        code, up = 0, 0
        for word, width in zip(words, fields, strict=True):
            part = word.view("uint8") >> (s * width % 8) & ((1 << width) - 1)
            code, up = code + (part.astype("int32") << up), up + width
        wanted = multiplier * code - zero

        codes = run_assembly(centre_assembly(*fields, s, multiplier), [*words, centres])

        fits = wanted <= 127
        assert (codes.astype("uint32").view("int8") == wanted)[fits].all() or not fits.all()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bits", range(1, 8))
def test_sums_of_groups_are_exact_before_they_are_scaled(bits, late):
    weight, codes = sliced_weight(
        random_codes(300, 1152, bits), bits, groups=9, block_rows=64 if bits % 2 else 128
    )
    tokens = token_codes(150, weight, 8 if late else 5)
    bias = torch.randn(300)
    config = PrefillConfig(
        block_m=128, block_n=256 if bits % 4 == 1 else 128, block_k=weight.slice_bytes,
        stages=2 + bits % 3, programs=3, group_m=2, part_m=64 if bits > 2 else 32,
        turn=8 * (bits % 2), round_slices=4 * (bits % 3), subnormal=bits != 6,
    )  # fmt: skip

    actual = emulated_prefill(late=late)(
        tokens, weight, bias, out_dtype=torch.float32, config=config
    )

    exact, slack = exact_and_slack(tokens, codes, weight, bias)
    assert ((actual - exact).abs() <= slack).all()
    # far less than any 16-bit output rounds away
    assert (actual - exact).square().mean().sqrt() < 1e-6 * exact.std()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bits", range(1, 8))
def test_programs_of_four_warps_take_one_group_of_an_order_at_a_time(bits, late):
    weight, codes = sliced_weight(random_codes(200, 1024, bits), bits, groups=8)
    tokens = token_codes(150, weight, 8)
    config = PrefillConfig(
        block_m=128, block_n=128, block_k=64, stages=2, num_warps=4, programs=3,
        round_slices=2, convert=True,
    )  # fmt: skip

    actual = emulated_prefill(late=late)(tokens, weight, out_dtype=torch.float32, config=config)

    exact, slack = exact_and_slack(tokens, codes, weight)
    assert ((actual - exact).abs() <= slack).all()


@pytest.mark.parametrize(("groups", "half_step", "bits"), [(8, False, 4), (2, False, 2),
                                                           (4, True, 3), (4, True, 6)])  # fmt: skip
def test_other_groups_and_half_step_grids(groups, half_step, bits):
    weight, codes = sliced_weight(
        random_codes(64, 512, bits), bits, groups=groups, half_step=half_step
    )
    tokens = token_codes(40, weight, 8)

    actual = emulated_prefill(late=True)(tokens, weight, out_dtype=torch.float32)

    exact, slack = exact_and_slack(tokens, codes, weight)
    assert ((actual - exact).abs() <= slack).all()


@pytest.mark.parametrize("token", [0, 255])
@pytest.mark.parametrize(("code", "zero_point"), [(127, 0), (0, 127)])
@pytest.mark.parametrize("subnormal", [False, True])
def test_the_largest_sums_are_converted_exactly(code, zero_point, token, subnormal):
    codes = torch.full((64, 512), code, dtype=torch.uint8)
    zeros = torch.full((64, 4), zero_point, dtype=torch.uint8)
    weight = slice_weight(pack_codes(codes, 7), torch.rand(64, 4).half(), zeros, 512)
    tokens = token_codes(64, weight, 8, fill=token)
    config = PrefillConfig(
        block_m=64, block_n=128, block_k=weight.slice_bytes, stages=2, subnormal=subnormal
    )

    actual = emulated_prefill(late=True)(tokens, weight, out_dtype=torch.float32, config=config)

    exact, slack = exact_and_slack(tokens, codes, weight)
    assert ((actual - exact).abs() <= slack).all()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize(("k", "groups"), [(1024, 8), (1024, 16), (1152, 9)])
def test_every_candidate_stays_within_rounding(bits, k, groups):
    weight, codes = sliced_weight(random_codes(700, k, bits), bits, groups=groups, device="cuda")
    tokens = token_codes(600, weight, 8, device="cuda")
    bias = torch.randn(700, device="cuda")
    exact, slack = exact_and_slack(tokens, codes, weight, bias)

    for config in group_configs(shape_of(weight, 600)):
        actual = prefill_linear(tokens, weight, bias, out_dtype=torch.float32, config=config)
        again = prefill_linear(tokens, weight, bias, out_dtype=torch.float32, config=config)

        assert ((actual - exact).abs() <= slack).all(), config
        assert torch.equal(actual, again), config


@pytest.mark.gpu
def test_few_programs_walk_many_tiles_of_groups():
    weight, codes = sliced_weight(random_codes(1024, 512, 4), 4, groups=4, device="cuda")
    tokens = token_codes(1000, weight, 8, device="cuda")
    config = PrefillConfig(
        block_m=128, block_n=128, block_k=64, stages=3, programs=5, group_m=3, round_slices=2
    )

    actual = prefill_linear(tokens, weight, out_dtype=torch.float32, config=config)

    exact, slack = exact_and_slack(tokens, codes, weight)
    assert ((actual - exact).abs() <= slack).all()
