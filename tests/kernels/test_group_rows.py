import torch

from kernels.group_rows import pack_group_rows
from tests.kernels.tile_cases import random_codes, sliced_weight


def packed(zero_point, bits=4, multiplier=1, group_size=128, dtype=torch.float16):
    zero = torch.tensor(zero_point, dtype=torch.int32).view(1, -1)
    ones = torch.ones_like(zero)
    return pack_group_rows(
        ones.to(dtype), zero, ones, rows=1, bits=bits, multiplier=multiplier, group_size=group_size
    )


def test_a_word_holds_scale_and_zero_point_groups_outermost():
    weight, _ = sliced_weight(random_codes(70, 512, 3), 3, groups=4)

    rows = weight.group_rows.rows

    assert rows.shape == (4, 128)
    assert torch.equal((rows & 0xFFFF).to(torch.int16).view(torch.float16).t(), weight.scale)
    assert torch.equal(128 - (rows >> 16).t(), weight.zero_point)


def test_terms_are_sums_over_groups():
    weight, codes = sliced_weight(random_codes(64, 512, 2), 2, groups=4, half_step=True)
    whole = 2 * codes.view(64, 4, 128).double() - weight.zero_point[:, :, None]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])

    terms, bound = weight.group_rows.terms, weight.group_rows.bound

    # codes 0..3 in half steps less 2 z + 1 of z 0..3: at most 7 away
    assert bound == 1 << 17
    assert weight.group_rows.bound_for(8) == bound
    assert weight.group_rows.bound_for(4) == bound // 8
    torch.testing.assert_close(terms[0], (whole.sum(2) * weight.scale).sum(1).float())
    torch.testing.assert_close(terms[1], (2 * weight.scale * signs).sum(1))


def test_what_is_no_signed_byte_or_sum_of_known_size_is_left_to_other_kernels():
    assert packed([0, 128]) is not None
    assert packed([0, 129]) is None
    assert packed([0], bits=7) is not None
    assert packed([0], bits=7, multiplier=2) is None
    assert packed([127], bits=7, multiplier=2) is not None
    assert packed([128], bits=8) is None
    assert packed([0], dtype=torch.float32) is None
    assert packed([0], group_size=32) is None
    assert packed([0], group_size=512) is None
